"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text ?? "";
  return made;
}

function nearest(items, wanted, iterationOf) {
  let low = 0, high = items.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (iterationOf(items[middle]) < wanted) low = middle + 1; else high = middle;
  }
  const before = Math.max(0, low - 1);
  return wanted - iterationOf(items[before]) < iterationOf(items[low]) - wanted ? before : low;
}

function isShown(run) {
  return document.getElementById(`run${run}`).checked;
}

// Hover, touch or arrow keys: the values of all shown runs at an iteration.
document.querySelectorAll(".plot").forEach((plot, number) => {
  const chart = data.charts[number];
  let cursor = null, values = null, at = null;

  function hide() {
    cursor?.remove();
    values?.remove();
    cursor = values = at = null;
  }

  function show(iteration) {
    const curves = chart.curves.filter((curve) => isShown(curve.run));
    hide();
    if (!curves.length) return;
    at = Math.min(data.last, Math.max(data.first, Math.round(iteration)));
    const share = (at - data.first) / (data.last - data.first);
    cursor = element("div", "cursor");
    cursor.style.left = `${100 * share}%`;
    values = element("div", "values", `near iteration ${at.toLocaleString("en")}`);
    values.style[share < 0.5 ? "right" : "left"] = "4px";
    for (const curve of curves) {
      const [iteration, smooth, least, most] = curve.points[nearest(curve.points, at, (point) => point[0])];
      const raw = most === undefined ? least : `${least} to ${most}`;
      const line = element("div", `s${curve.run}`);
      const where = iteration === at ? "" : `, iteration ${iteration.toLocaleString("en")}`;
      line.append(element("i", "swatch"), `${data.runs[curve.run]}: ${smooth} ${chart.unit} (raw ${raw}${where})`);
      values.append(line);
    }
    plot.append(cursor, values);
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(data.first + ((event.clientX - box.left) / box.width) * (data.last - data.first));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show((at ?? data.last) + step * Math.max(1, (data.last - data.first) / 50));
  });
});

// Pictures: a slider for each run; moving one moves the others to their nearest iteration.
const strips = [...document.querySelectorAll(".strip")].map((strip) => {
  const figures = [...strip.querySelectorAll("figure")];
  const slider = strip.querySelector("input");
  const iterationOf = (figure) => Number(figure.dataset.iteration);
  const choose = (chosen) => {
    slider.value = chosen;
    slider.setAttribute("aria-valuetext", `iteration ${iterationOf(figures[chosen])}`);
    figures.forEach((figure, number) => figure.classList.toggle("hidden", number !== chosen));
  };
  slider.hidden = figures.length < 2;
  slider.addEventListener("input", () => {
    choose(Number(slider.value));
    const iteration = iterationOf(figures[slider.value]);
    strips.filter((other) => other.slider !== slider).forEach((other) => other.go(iteration));
  });
  choose(figures.length - 1);
  return { slider, go: (iteration) => choose(nearest(figures, iteration, iterationOf)) };
});
