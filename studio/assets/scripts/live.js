// Bring a part of the page into view once it has been opened, and the keyboard with it.
window.studioShow = (id) => {
  const part = document.getElementById(id);
  if (!part) return;
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  part.scrollIntoView({ block: 'start', behavior: calm ? 'auto' : 'smooth' });
  part.querySelector('button')?.focus({ preventScroll: true });
};

// The page of a run that goes on asks for its news and changes what differs where it stands: numbers, lines, the doctor's
// words. What Gradio drew last is read off the mark in the head; where more than that has changed, Gradio draws anew
// (`catchUp`, told what it drew last). See studio/live_news.py.
window.studioLive = (element, server, catchUp) => {
  const every = 1350;
  // After so many questions without an answer Gradio asks: where the server has gone, it says so.
  const patience = 3;
  let last = null;
  let asking = false;
  let again = false;
  // Somebody comes to the page: a run that stood still is asked for once too, for it may have been resumed elsewhere.
  let came = false;
  let unanswered = 0;

  const change = (old, fresh) => {
    if (old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    // What the pointer has brought up stays.
    if (old.matches(".tip")) return;
    for (const { name } of [...old.attributes]) {
      if (name !== "data-hover" && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const had = [...old.childNodes];
    const come = [...fresh.childNodes];
    come.forEach((child, at) => (at < had.length ? change(had[at], child) : old.append(child)));
    had.slice(come.length).forEach((child) => child.remove());
  };
  // Says whether that was all: what is not there, or goes, is Gradio's to draw. What is not told stays.
  const draw = (old, html) => {
    if (html === undefined) return true;
    const made = document.createElement("template");
    made.innerHTML = html;
    const fresh = made.content.firstElementChild;
    if (old && fresh) change(old, fresh);
    return !old === !fresh;
  };
  // Of charts that are told in parts: nothing new, a whole one, or how it is described and where its lines go now.
  const redraw = (charts, told) => {
    if (told === undefined) return true;
    const figures = [...(charts?.children ?? [])];
    if (figures.length !== told.length) return false;
    return told.every((part, at) => {
      if (part === null) return true;
      if (typeof part === "string") return draw(figures[at], part);
      const lines = figures[at].querySelectorAll("svg > polyline");
      figures[at].setAttribute("aria-label", part.said);
      return Object.entries(part.lines).every(([line, points]) => {
        lines[line]?.setAttribute("points", points);
        return line in lines;
      });
    });
  };

  const ask = async () => {
    const mark = element.querySelector(came ? ".live-mark" : ".live-mark[data-live]");
    const visible = element.checkVisibility?.() ?? element.getClientRects().length > 0;
    if (!mark || document.hidden || !visible) return;
    if (asking) {
      again = true;
      return;
    }
    came = false;
    const wanted = () => ({
      log: Boolean(document.querySelector("#log-scale input")?.checked),
      smoothing: Number(document.querySelector("#smoothing input[type=range]")?.value ?? NaN),
      hover: Boolean(document.querySelector("#live-curves .plot:hover")),
    });
    const now = () => JSON.stringify([mark.isConnected, mark.dataset, wanted()]);
    const drawn = { ...mark.dataset };
    const before = now();
    asking = true;
    try {
      const still = drawn.live === undefined ? drawn.seen : "";
      const { seen, have } = last?.before === before ? last : { seen: still, have: "" };
      const { run, looks, language } = drawn;
      const news = await server.live_news({ run, looks, seen, have, language, ...wanted() });
      if (!news) throw new Error();
      unanswered = 0;
      // What Gradio has drawn meanwhile, or for what was set meanwhile, is newer than this answer.
      if (now() !== before) again = true;
      else if (news.gone) mark.removeAttribute("data-live");
      else if (news.stale) catchUp(drawn);
      else if (news.seen) {
        const whole = [
          draw(element.querySelector(".run-head"), news.head),
          draw(document.querySelector("#live-doctor .doctor"), news.doctor),
          draw(document.querySelector("#live-curves .charts"), news.curves),
          redraw(document.querySelector("#live-curves .charts"), news.charts),
        ].every(Boolean);
        // Where Gradio is to draw, what stands there is no ground for what comes next.
        last = { before, seen: news.seen, have: whole ? news.have : "" };
        window.studioHover();
        if (!whole) catchUp(drawn);
      }
    } catch {
      unanswered += 1;
      if (unanswered % patience === 0) catchUp(drawn);
    } finally {
      asking = false;
    }
    if (again) {
      again = false;
      ask();
    }
  };

  // Gradio may draw the component anew, and then this runs again, with another element.
  const over = new AbortController();
  const timer = setInterval(() => {
    if (element.isConnected) ask();
    else {
      clearInterval(timer);
      over.abort();
    }
  }, every);
  const listen = (name, heard) => document.addEventListener(name, heard, { signal: over.signal });
  const arrive = () => {
    came = true;
    ask();
  };
  listen("visibilitychange", arrive);
  const tab = (event) => event.detail === "train" && setTimeout(arrive, 50);
  window.addEventListener("studio-tab", tab, { signal: over.signal });
  // The data of the hover text is most of what there is to say of a curve; it comes where somebody points at one.
  listen("pointerover", (event) => {
    const [to, from] = [event.target, event.relatedTarget].map((one) => one?.closest?.("#live-curves .plot"));
    if (to && to !== from) ask();
  });
};
