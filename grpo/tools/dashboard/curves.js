// Show the values under the pointer in every plot inside `element` (grpo/tracking/drawing.py).
// Names are set as text, never as markup.
const nearest = (steps, wanted) => {
  let best = 0;
  steps.forEach((step, index) => {
    if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = index;
  });
  return best;
};
const add = (parent, kind, text, className) => {
  const made = parent.appendChild(document.createElement(kind));
  made.textContent = text;
  made.className = className || "";
  return made;
};
const leave = () => element.querySelectorAll(".tip, .rule").forEach((each) => each.remove());
element.addEventListener("mouseleave", leave);
element.addEventListener("mousemove", (event) => {
  leave();
  const area = event.target.closest(".area");
  if (!area) return;
  const box = area.getBoundingClientRect();
  const [first, last] = JSON.parse(area.dataset.across);
  const lines = JSON.parse(area.dataset.lines);
  const wanted = first + ((event.clientX - box.left) / box.width) * (last - first);
  const found = lines.map((line) => {
    const index = nearest(line.steps, wanted);
    return { ...line, step: line.steps[index], value: line.values[index] };
  });
  const { step } = found.reduce((a, b) => (Math.abs(b.step - wanted) < Math.abs(a.step - wanted) ? b : a));
  const share = last > first ? (step - first) / (last - first) : 0.5;
  add(area, "div", "", "rule").style.left = `${100 * share}%`;
  const tip = add(area, "div", "", share > 0.5 ? "tip left" : "tip");
  tip.style[share > 0.5 ? "right" : "left"] = `${100 * (share > 0.5 ? 1 - share : share)}%`;
  add(tip, "b", `step ${Math.round(step).toLocaleString("en")}`);
  for (const line of found.sort((a, b) => b.value - a.value).slice(0, 12)) {
    const row = add(tip, "div", "");
    add(row, "u", "").style.background = line.color;
    add(row, "span", lines.length > 1 ? `${line.name} ${line.value}` : `${line.value}`);
  }
});
