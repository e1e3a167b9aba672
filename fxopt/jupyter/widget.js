// The front end of a stepper: everything that it shows comes from the kernel, and every click goes there.
function element(kind, className, parent) {
  const made = document.createElement(kind);
  made.className = className;
  parent.append(made);
  return made;
}

function render({ model, el }) {
  el.classList.add("fxopt-stepper");
  const bar = element("div", "fxopt-bar", el);
  const button = (label, title, message) => {
    const made = element("button", "fxopt-button", bar);
    made.type = "button";
    made.textContent = label;
    made.title = title;
    made.addEventListener("click", () => model.send(message()));
    return made;
  };
  const to = (position) => ({ do: "go", position });
  const back = button("◀", "one rewrite back", () => to(model.get("position") - 1));
  const track = element("div", "fxopt-track", bar);
  const slider = element("input", "fxopt-slider", track);
  slider.type = "range";
  slider.min = 0;
  slider.setAttribute("aria-label", "position in the history");
  slider.addEventListener("input", () => { status.textContent = model.get("labels")[slider.valueAsNumber]; });
  slider.addEventListener("change", () => model.send(to(slider.valueAsNumber)));
  const forth = button("▶", "one rewrite on", () => to(model.get("position") + 1));
  const toggle = button("undo", "undo this rewrite in the graph, or make it again", () => ({ do: "toggle" }));
  const verify = button("verify", "against the graph before the first commit", () => ({ do: "verify" }));
  const time = button("time", "against the graph before the first commit", () => ({ do: "time" }));
  const good = button("good", "this graph is right: look later", () => ({ do: "good" }));
  const bad = button("bad", "this graph is wrong: look earlier", () => ({ do: "bad" }));
  const ticks = element("div", "fxopt-ticks", track);  // under the slider, where its thumb stood
  const status = element("p", "fxopt-status", el);
  status.setAttribute("role", "status");
  const answer = element("div", "fxopt-answer", el);
  const diff = element("div", "fxopt-diff", el);

  const update = () => {
    const position = model.get("position"), last = model.get("last"), marks = model.get("marks");
    slider.max = last;
    slider.value = position;
    back.disabled = position === 0;
    forth.disabled = position === last;
    toggle.disabled = position === 0;
    toggle.textContent = model.get("active") ? "undo" : "apply";
    verify.disabled = time.disabled = !model.get("questions");
    status.textContent = model.get("status");
    answer.innerHTML = model.get("answer"); // made and escaped by the kernel, as are all outputs
    diff.innerHTML = model.get("diff");
    ticks.replaceChildren();
    for (const [at, mark] of Object.entries(marks)) {
      const tick = element("span", `fxopt-tick fxopt-${mark}`, ticks);
      tick.style.left = `${last ? (100 * at) / last : 0}%`;
      tick.title = `${at}: ${mark}`;
    }
  };
  update();
  model.on("change", update);
  return () => model.off("change", update);
}

export default { render };
