"""Put first on PYTHONPATH, in a server that is attacked: every process of it writes down what it should not have done.

`TRIPWIRE_LOG` is where; `TRIPWIRE_SECRETS` may not be opened at all; files may be written below `TRIPWIRE_WRITABLE`
only. Python's own audit events tell; they come before the deed, whoever does it.
"""

import json
import os
import sys

_SECRETS = tuple(os.environ["TRIPWIRE_SECRETS"].split(os.pathsep))
_WRITABLE = (*os.environ["TRIPWIRE_WRITABLE"].split(os.pathsep), "/dev/")
_LOG = os.open(os.environ["TRIPWIRE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
_CHANGED = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _note(kind, *told):
    os.write(_LOG, (json.dumps([kind, *map(str, told)]) + "\n").encode())


def _path(value):
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    return os.path.abspath(value) if isinstance(value, str) else ""


def _allowed(path):
    return not path or path.startswith(_WRITABLE) or "__pycache__" in path


def _relative(event, values):
    return event in ("os.remove", "os.rmdir", "os.mkdir") and values[-1] != -1 and not os.path.isabs(values[0])


def _hook(event, values):
    if event == "open":
        path = _path(values[0])
        if path.startswith(_SECRETS):
            _note("read", path)
        elif isinstance(values[2], int) and values[2] & _WRITING and not _allowed(path):
            _note("write", path)
    elif event in _STARTED:
        _note("start", event, values[1] if event == "subprocess.Popen" else values)
    elif event in _CHANGED and _relative(event, values):
        return  # below a folder that is open, as shutil.rmtree does it: what it began with was told by its whole path
    elif event in _CHANGED:
        for path in filter(None, map(_path, values[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1])):
            if not _allowed(path):
                _note("change", event, path)
    elif event == "os.kill":
        _note("kill", values[0], values[1])
    elif event in ("os.listdir", "os.scandir") and _path(values[0]).startswith(_SECRETS):
        _note("read", _path(values[0]))
    elif event == "import" and values[0].startswith("evil_module"):
        _note("import", values[0])


sys.addaudithook(_hook)
