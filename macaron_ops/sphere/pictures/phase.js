// The share of clustered starts, beta across and time upwards; the pointer reads a place, a click shows a beta's curve.
const w = canvas.width, h = canvas.height, left = 60, bottom = 50;
let chosen = null;
const controls = document.getElementById("controls");
controls.innerHTML = '<output id="here">point at the picture; click for a curve</output>';
const here = document.getElementById("here");
const x = i => left + (w - left) * i / data.betas.length, y = j => (h - bottom) * (1 - j / data.times.length);
function place(times, style, dashes) {
  pen.strokeStyle = style; pen.lineWidth = 3; pen.setLineDash(dashes); pen.beginPath();
  let pending = true;
  times.forEach((t, i) => {
    if (t === null || t > data.end) { pending = true; return; }
    const to = [x(i + 0.5), (h - bottom) * (1 - t / data.end)];
    if (pending) pen.moveTo(...to); else pen.lineTo(...to);
    pending = false;
  });
  pen.stroke(); pen.setLineDash([]);
}
function draw() {
  pen.clearRect(0, 0, w, h);
  data.share.forEach((row, i) => row.forEach((share, j) => {
    pen.fillStyle = colour(share / 100); pen.fillRect(x(i), y(j + 1), x(i + 1) - x(i) + 1, y(j) - y(j + 1) + 1);
  }));
  place(data.median, "#ffffff", [4, 8]); place(data.exact, "#ffb454", []);
  pen.fillStyle = "#667085"; pen.font = "22px system-ui";
  for (let k = 0; k <= 6; k++) pen.fillText((data.end * k / 6).toPrecision(3), 0, Math.max((h - bottom) * (1 - k / 6), 20));
  const step = Math.max(1, Math.round(data.betas.length / 9));
  data.betas.forEach((beta, i) => { if (i % step === step - 1) pen.fillText(beta.toPrecision(2), x(i + 0.5) - 14, h - 16); });
  pen.fillText("beta", w - 50, h - 2);
  if (chosen !== null) {
    pen.strokeStyle = "#c2417c"; pen.lineWidth = 4; pen.beginPath();
    data.share[chosen].forEach((share, j) => pen.lineTo(left + (w - left) * share / 100, y(j + 0.5)));
    pen.stroke();
  }
}
function at(e) {
  const box = canvas.getBoundingClientRect();
  const i = Math.floor(((e.clientX - box.left) * w / box.width - left) / (w - left) * data.betas.length);
  const j = Math.floor((1 - (e.clientY - box.top) * h / box.height / (h - bottom)) * data.times.length);
  return i >= 0 && i < data.betas.length && j >= 0 && j < data.times.length ? [i, j] : null;
}
canvas.onpointermove = e => {
  const found = at(e);
  if (found) here.textContent = `beta = ${data.betas[found[0]]}, t = ${data.times[found[1]].toPrecision(3)}: `
    + `${data.share[found[0]][found[1]]}% clustered; exactly, from an orthonormal start, at ${data.exact[found[0]].toPrecision(3)}`;
};
canvas.onclick = e => { const found = at(e); chosen = found && found[0] !== chosen ? found[0] : null; draw(); };
canvas.style.cursor = "crosshair";
draw();
