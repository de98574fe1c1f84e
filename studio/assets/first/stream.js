// Gradio's server ends the stream of answers as soon as nothing is pending. What the page asks in that very moment is
// lost to it: the page still takes the stream for open and opens no other, so the answer waits at the server until
// something else is asked. A page that follows a run would stand still. So the answers are counted here, and when a
// stream has ended while one is missing, the page asks something small, which opens the next stream.
(() => {
  const fetched = window.fetch;
  const missing = new Map();
  const told = new Set();
  let open = 0;
  const look = () => {
    if (open || !missing.size) return;
    for (const [id, times] of missing) {
      if (times < 3) missing.set(id, times + 1);
      else missing.delete(id);
    }
    document.getElementById("studio-wake")?.click();
  };
  const asked = async (answer) => {
    const { event_id: id } = await answer.json();
    if (id && !told.delete(id)) missing.set(id, 0);
  };
  const heard = (line) => {
    const found = /^data: \{"msg":"process_completed","event_id":"([^"]+)"/.exec(line);
    if (found && !missing.delete(found[1])) told.add(found[1]);
    if (told.size > 1000) told.clear();
  };
  const watched = (answer) => {
    const source = answer.body.getReader();
    const text = new TextDecoder();
    let head = "";
    let over = false;
    const end = () => {
      if (over) return;
      over = true;
      open -= 1;
      setTimeout(look, 300);
    };
    const body = new ReadableStream({
      async pull(out) {
        try {
          const { value, done } = await source.read();
          if (done) {
            end();
            out.close();
            return;
          }
          const lines = text.decode(value, { stream: true }).split("\n");
          lines.forEach((line, at) => {
            if (head.length < 200) head += line.slice(0, 200);
            if (at === lines.length - 1) return;
            heard(head);
            head = "";
          });
          out.enqueue(value);
        } catch (fault) {
          end();
          out.error(fault);
        }
      },
      cancel(reason) {
        end();
        return source.cancel(reason);
      },
    });
    return new Response(body, { status: answer.status, statusText: answer.statusText, headers: answer.headers });
  };
  window.fetch = async (...given) => {
    const address = String(given[0]?.url ?? given[0]);
    const stream = address.includes("/queue/data?");
    if (stream) open += 1;
    let answer;
    try {
      answer = await fetched(...given);
    } catch (fault) {
      if (stream) open -= 1;
      throw fault;
    }
    if (stream && !(answer.ok && answer.body)) open -= 1;
    if (!answer.ok) return answer;
    if (stream) return answer.body ? watched(answer) : answer;
    if (address.includes("/queue/join")) asked(answer.clone()).catch(() => {});
    return answer;
  };
})();
