// Particles on S^2 by an orthographic view that is turned by dragging; a slider is the time.
let yaw = 0.6, pitch = 0.35, frame = 0, playing = null;
const controls = document.getElementById("controls");
controls.innerHTML = '<button id="play">play</button> <input id="time" type="range" min="0" step="1"> <output id="now"></output>';
const time = document.getElementById("time"), now = document.getElementById("now"), play = document.getElementById("play");
time.max = data.times.length - 1; time.value = 0;

function turned([x, y, z]) {
  const a = x * Math.cos(yaw) - y * Math.sin(yaw), b = x * Math.sin(yaw) + y * Math.cos(yaw);
  return [a, z * Math.cos(pitch) - b * Math.sin(pitch), b * Math.cos(pitch) + z * Math.sin(pitch)];
}
function draw() {
  const w = canvas.width, h = canvas.height, r = 0.46 * Math.min(w, h);
  const at = ([a, b]) => [w / 2 + r * a, h / 2 - r * b];
  pen.clearRect(0, 0, w, h);
  if (data.potential) for (const [point, v] of data.potential) {
    const p = turned(point);
    if (p[2] > 0) { const [a, b] = at(p); pen.fillStyle = colour(v); pen.globalAlpha = 0.75; pen.beginPath(); pen.arc(a, b, 9, 0, 7); pen.fill(); }
  }
  pen.globalAlpha = 1; pen.strokeStyle = "#98a2b3"; pen.lineWidth = 1.5;
  pen.beginPath(); pen.arc(w / 2, h / 2, r, 0, 7); pen.stroke();
  for (const point of data.points[frame]) {
    const p = turned(point), [a, b] = at(p);
    pen.fillStyle = "#c2417c"; pen.globalAlpha = p[2] > 0 ? 0.95 : 0.18;
    pen.beginPath(); pen.arc(a, b, 6, 0, 7); pen.fill();
  }
  pen.globalAlpha = 1;
  now.textContent = `t = ${data.times[frame].toPrecision(4)}`;
}
let last = null;
canvas.onpointerdown = e => { last = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); };
canvas.onpointerup = () => { last = null; };
canvas.onpointermove = e => {
  if (!last) return;
  yaw += (e.clientX - last[0]) * 0.008; pitch += (e.clientY - last[1]) * 0.008; last = [e.clientX, e.clientY]; draw();
};
time.oninput = () => { frame = Number(time.value); draw(); };
play.onclick = () => {
  if (playing) { clearInterval(playing); playing = null; play.textContent = "play"; return; }
  play.textContent = "stop";
  playing = setInterval(() => { frame = (frame + 1) % data.times.length; time.value = frame; draw(); }, 60);
};
draw();
