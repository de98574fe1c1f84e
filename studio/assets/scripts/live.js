// Bring a part of the page into view once it has been opened, and the keyboard with it.
window.studioShow = (id) => {
  const part = document.getElementById(id);
  if (!part) return;
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  part.scrollIntoView({ block: 'start', behavior: calm ? 'auto' : 'smooth' });
  part.querySelector('button')?.focus({ preventScroll: true });
};

// The page of a run that goes on listens to the run's news and changes what differs where it stands: numbers, lines, the
// doctor's words. What Gradio drew last is read off the mark in the head; where more than that has changed, Gradio draws
// anew (`catchUp`, told what it drew last). See studio/live_news.py.
window.studioLive = (element, catchUp) => {
  // After so many failures Gradio asks: where the server has gone, it says so.
  const patience = 3;
  const [every, later, silent] = [1450, 4000, 45000];
  let stream = null;
  let asked = null;
  let timer = 0;
  let turn = null;
  let giveBack = null;
  let failed = 0;
  // Somebody comes to the page: a run that stood still is asked for once too, for it may have been resumed elsewhere.
  let came = false;

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

  const mark = () => element.querySelector(".live-mark");
  // What is to be asked for now; nothing for a run that stands still, nor for a page that nobody sees.
  const wanted = () => {
    const { run, looks, language, seen, live } = mark()?.dataset ?? {};
    const visible = element.checkVisibility?.() ?? element.getClientRects().length > 0;
    const still = live === undefined;
    if (!run || document.hidden || !visible || !element.isConnected || (still && !came)) return null;
    const question = {
      ...{ run, looks, language, seen: still ? seen : "" },
      ...(still ? { once: true } : {}),
      log: Boolean(document.querySelector("#log-scale input")?.checked),
      smoothing: document.querySelector("#smoothing input[type=range]")?.value ?? "",
      hover: Boolean(document.querySelector("#live-curves .plot:hover")),
    };
    // A private Space knows its visitor by this.
    const sign = new URLSearchParams(window.location.search).get("__sign");
    return new URLSearchParams(sign ? { ...question, __sign: sign } : question).toString();
  };
  const hear = (news) => {
    failed = 0;
    // What Gradio has drawn meanwhile, or for what was set meanwhile, is newer than this.
    if (wanted() !== asked) return follow();
    came = false;
    if (news.gone) mark().removeAttribute("data-live");
    if (news.stale) catchUp({ ...mark().dataset });
    if (news.head !== undefined) {
      const charts = document.querySelector("#live-curves .charts");
      const whole = [
        draw(element.querySelector(".run-head"), news.head),
        draw(document.querySelector("#live-doctor .doctor"), news.doctor),
        draw(charts, news.curves),
        redraw(charts, news.charts),
      ].every(Boolean);
      window.studioHover();
      if (!whole) catchUp({ ...mark().dataset });
    }
    if (mark().dataset.live === undefined) follow();
  };
  const fail = () => {
    failed += 1;
    if (failed % patience === 0 && mark()) catchUp({ ...mark().dataset });
  };

  const stop = () => {
    stream?.close();
    stream = null;
    clearTimeout(timer);
  };
  // A browser keeps six connections to a server, and each of Gradio's pages holds one. So one page of a browser has a
  // stream, for as long as it follows a run; others that are in sight ask.
  const take = () =>
    new Promise((done) => {
      if (giveBack || !navigator.locks) return done(true);
      navigator.locks.request("studio-live", { ifAvailable: true }, (lock) => {
        done(Boolean(lock));
        return lock && new Promise((released) => (giveBack = released));
      });
    });
  const give = () => {
    giveBack?.();
    giveBack = null;
  };
  const follow = async (anew = false) => {
    const now = over.signal.aborted ? null : wanted();
    if (now === asked && anew !== true) return;
    stop();
    asked = now;
    if (now === null) return give();
    const mine = (turn = {});
    const alone = await take();
    if (mine !== turn || asked !== now) return asked === null && give();
    // The page's own address: the server may not know by which it is reached.
    const root = new URL(window.gradio_config?.root || "/", window.location.href).pathname.replace(/\/$/, "");
    const question = alone ? now : `${now}&once=true`;
    const opened = new EventSource(`${window.location.origin}${root}/studio/live?${question}`);
    stream = opened;
    // A stream that says nothing has broken on the way.
    const watch = () => {
      clearTimeout(timer);
      timer = setTimeout(() => [fail(), follow(true)], silent);
    };
    watch();
    opened.onmessage = (event) => {
      if (stream !== opened) return;
      watch();
      hear(JSON.parse(event.data));
      if (alone || stream !== opened) return;
      stop();
      timer = setTimeout(() => follow(true), every);
    };
    opened.onerror = () => {
      if (stream !== opened) return;
      fail();
      // Refused, it is not asked for again by itself.
      if (opened.readyState !== EventSource.CLOSED || stream !== opened) return;
      stop();
      timer = setTimeout(() => follow(true), later);
    };
  };

  // Gradio may draw the component anew, and then this runs again, with another element.
  window.studioLiveOver?.abort();
  const over = (window.studioLiveOver = new AbortController());
  const listen = (target, name, heard) => target.addEventListener(name, heard, { signal: over.signal });
  const arrive = () => {
    came = true;
    follow();
  };
  listen(document, "visibilitychange", arrive);
  listen(window, "studio-tab", (event) => event.detail === "train" && setTimeout(arrive, 50));
  // The data of the hover text is most of what there is to say of a curve; it comes where somebody points at one.
  listen(document, "pointerover", (event) => {
    const [to, from] = [event.target, event.relatedTarget].map((one) => one?.closest?.("#live-curves .plot"));
    if (to && to !== from) follow();
  });
  // Gradio has drawn another mark or changed it, and with it what the news were told for; or the page of the run has
  // come into sight or gone out of it.
  let known = JSON.stringify(mark()?.dataset);
  const drawn = new MutationObserver(() => {
    const now = JSON.stringify(mark()?.dataset);
    if (now !== known) follow(true);
    known = now;
  });
  const attributeFilter = ["run", "seen", "looks", "language", "live"].map((name) => `data-${name}`);
  drawn.observe(element, { childList: true, subtree: true, attributeFilter });
  const sized = new ResizeObserver(() => follow());
  sized.observe(element);
  over.signal.addEventListener("abort", () => {
    drawn.disconnect();
    sized.disconnect();
    follow();
  });
  follow();
};
