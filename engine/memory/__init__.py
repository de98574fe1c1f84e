"""Will it fit: the peak memory of a job, predicted from its shapes, without loading a weight.

    from engine.memory import fits, predict
    prediction = predict(JobSpec.from_file("job.yaml"))
    print("\\n".join(prediction.lines()), fits(prediction, 8 * 10**9))

How it is done, how exact it is and what it leaves out: docs/memory.md. Importing this package imports no torch.
"""

from __future__ import annotations

from engine.memory.predicting import PredictionError as PredictionError
from engine.memory.predicting import Remedy as Remedy
from engine.memory.predicting import largest_batch as largest_batch
from engine.memory.predicting import predict as predict
from engine.memory.predicting import remedy as remedy
from engine.memory.prediction import Prediction as Prediction
from engine.memory.prediction import fits as fits
from engine.memory.prediction import parse_size as parse_size
from engine.memory.prediction import size as size
