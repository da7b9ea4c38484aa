"use strict";
(() => {
  const all = (query, of = document) => [...of.querySelectorAll(query)];
  const make = (tag, more = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), more);
    element.append(...inside);
    return element;
  };
  const button = (text, label, press) => {
    const made = make("button", { type: "button", className: "press", onclick: press }, text);
    if (label) made.setAttribute("aria-label", label);
    return made;
  };

  // The theme: the system's until it is chosen.
  const root = document.documentElement;
  const dark = () => getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = button("", "", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });
  const named = () => { theme.textContent = dark() ? "Light theme" : "Dark theme"; };
  theme.classList.add("theme");
  named();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  document.querySelector("nav").prepend(theme);

  // Copying, of a command without the line breaks that the page may give it.
  const said = make("p", { className: "away" });
  said.setAttribute("role", "status");
  document.body.append(said);
  const copy = async (text, by) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = make("textarea", { value: text, className: "away" });
      by.after(field);
      field.select();
      document.execCommand("copy");
      field.remove();
      by.focus();
    }
    by.textContent = said.textContent = "Copied";
    setTimeout(() => { by.textContent = "Copy"; said.textContent = ""; }, 2000);
  };
  for (const pre of all("pre")) {
    const around = make("div", { className: "code" });
    pre.replaceWith(around);
    around.append(pre, button("Copy", "Copy the code", (event) => copy(pre.textContent, event.currentTarget)));
  }

  // Tables that scroll say so; those of several rows are sorted by their columns.
  for (const wide of all(".wide")) {
    const sign = make("p", { className: "scrolls", hidden: true }, "← scroll sideways →");
    sign.setAttribute("aria-hidden", "true");
    wide.before(sign);
    const watch = new ResizeObserver(() => { sign.hidden = wide.scrollWidth <= wide.clientWidth + 1; });
    watch.observe(wide);
    watch.observe(wide.firstElementChild);
  }
  const order = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compared = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  for (const table of all("table.sortable")) {
    const bodies = all("tbody", table).map((body) => [body, [...body.rows].filter((r) => r.className !== "group")]);
    if (!bodies.some(([, rows]) => rows.length > 1)) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const sorter = button(head.textContent, "", () => {
        const way = head.ariaSort === "ascending" ? "descending" : head.ariaSort === "descending" ? "" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (way) head.setAttribute("aria-sort", way);
        for (const [body, rows] of bodies) {
          const sorted = way ? rows.toSorted((a, b) => compared(order(a, column), order(b, column))) : rows;
          body.append(...(way === "descending" ? sorted.toReversed() : sorted));
        }
      });
      sorter.className = "";
      head.replaceChildren(sorter);
    });
  }

  // Pictures: each pair, and each image that is in none, is shown large.
  const views = all("main .pair, main .sheet td, main .moments td").filter((view) => view.querySelector("img"));
  const details = (view) => all("img", view).map((image) => [image.src, image.alt]);
  const prompt = (alt) => alt.slice(alt.indexOf(": ") + 2);
  const box = make("dialog", { className: "box" });
  const counted = make("span"), shown = make("div", { className: "views" }), caption = make("p");
  let current = 0;
  const show = (place) => {
    current = (place + views.length) % views.length;
    const view = views[current], images = details(view);
    const similarity = view.dataset.ssim ? ` · SSIM ${view.dataset.ssim}` : "";
    counted.textContent = `${current + 1} of ${views.length}${similarity}`;
    caption.textContent = prompt(images[0][1]);
    shown.replaceChildren(...images.map(([src, alt]) =>
      make("figure", {}, make("img", { src, alt }), make("figcaption", {}, alt.slice(0, alt.indexOf(": "))))));
  };
  const visible = (step) => {
    let place = current;
    do place = (place + step + views.length) % views.length;
    while (views[place].offsetParent === null && place !== current);
    show(place);
  };
  const open = (place) => { show(place); box.showModal(); };
  box.setAttribute("aria-label", "Large pictures");
  box.append(
    make("div", { className: "bar" }, button("←", "Previous picture", () => visible(-1)),
      button("→", "Next picture", () => visible(1)), counted, button("Close", "", () => box.close())),
    shown, caption);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); visible(step); }
  });
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("close", () => views[current].focus());
  document.body.append(box);
  views.forEach((view, place) => {
    const first = view.matches(".pair") || !view.previousElementSibling?.querySelector("img");
    view.dataset.big = "";
    view.tabIndex = first ? 0 : -1; // arrow keys lead to the others
    view.setAttribute("role", "button");
    view.setAttribute("aria-label", `Enlarge: ${prompt(details(view)[0][1])}`);
    view.addEventListener("click", () => open(place));
    view.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(place);
    });
  });

  // Before and after of the first screen, one over the other.
  const groups = document.querySelector("#summary .groups");
  const pairs = groups ? all(".pair", groups) : [];
  if (pairs.length) {
    const frame = make("div", { className: "frame" });
    const slider = make("input", { type: "range", min: 0, max: 100, value: 50 });
    const name = make("span"), images = [make("img"), make("img")];
    let at = 0;
    const turn = (step) => {
      at = (at + step + pairs.length) % pairs.length;
      details(pairs[at]).forEach(([src, alt], i) => Object.assign(images[i], { src, alt }));
      name.textContent = prompt(images[0].alt);
    };
    const moved = () => {
      frame.style.setProperty("--at", `${slider.value}%`);
      slider.setAttribute("aria-valuetext", `${slider.value}% before, ${100 - slider.value}% after`);
    };
    slider.setAttribute("aria-label", "How much of the picture before the erasure is shown");
    slider.addEventListener("input", moved);
    name.setAttribute("aria-live", "polite");
    frame.append(...images, make("span", { className: "tag left" }, "before"),
      make("span", { className: "tag right" }, "after"), slider);
    const bar = make("div", { className: "bar" }, button("←", "Previous prompt", () => turn(-1)), name,
      button("→", "Next prompt", () => turn(1)));
    groups.classList.add("viewed");
    groups.querySelector(".group").classList.add("first");
    groups.prepend(make("div", { className: "wipe" }, frame, bar));
    turn(0);
    moved();
  }

  // Where there are many pictures, those that changed alone.
  const every = all("main .pair"), same = every.filter((pair) => pair.matches(".same"));
  if (every.length >= 8 && same.length && same.length < every.length) {
    const tick = make("input", { type: "checkbox" });
    tick.addEventListener("change", () => document.body.classList.toggle("changed", tick.checked));
    groups?.before(make("label", { className: "only" }, tick,
      `Only pictures that changed (${every.length - same.length} of ${every.length})`));
  }
})();
