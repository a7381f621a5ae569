// The image with boxes over it, in pixels of the image. value: width, height, snap, marks, point, box; picture: a data URL.
// Triggers 'place' {point}, 'mark' {box}, 'clear'. Runs once; the page calls paint() whenever value or picture change.
const SVG = 'http://www.w3.org/2000/svg';
let mode = 'point', cursor = null, corner = null, drag = null, svg = null;

function made(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.appendChild(node);
  return node;
}

function side() { return Math.max(props.value.width, props.value.height); }

function outline(group, box, color, dashed) {
  const [x1, y1, x2, y2] = box;
  const place = {x: x1, y: y1, width: Math.max(x2 - x1, 0.01), height: Math.max(y2 - y1, 0.01), fill: 'none',
                 'vector-effect': 'non-scaling-stroke'};
  const dash = dashed ? {'stroke-dasharray': '9 6'} : {};
  made('rect', {...place, ...dash, stroke: '#000', 'stroke-width': 6, 'stroke-opacity': .75}, group);
  made('rect', {...place, ...dash, stroke: color, 'stroke-width': 3}, group);
}

function label(group, mark) {
  const size = side() / 32, [x1, y1, x2, y2] = mark.box;
  const text = made('text', {'font-size': size, fill: '#000', 'font-family': 'system-ui, sans-serif', 'font-weight': 600}, group);
  text.textContent = mark.label;
  const width = text.getComputedTextLength() + size * .5, height = size * 1.3;
  let x = mark.dashed ? x2 - width : x1, y = mark.dashed ? y2 + size * .15 : y1 - height - size * .15;
  x = Math.min(Math.max(x, 0), props.value.width - width);
  y = Math.min(Math.max(y, 0), props.value.height - height);
  const dark = ['#0072B2', '#D55E00'].includes(mark.color);
  group.insertBefore(made('rect', {x, y, width, height, fill: mark.color, rx: size * .15}), text);
  text.setAttribute('x', x + size * .25);
  text.setAttribute('y', y + size);
  if (dark) text.setAttribute('fill', '#fff');
}

function cross(group, point, color, arm) {
  const [x, y] = point, length = side() * arm;
  for (const [ink, width] of [['#000', 5], [color, 2]]) {
    for (const [dx, dy] of [[length, 0], [0, length]])
      made('line', {x1: x - dx, y1: y - dy, x2: x + dx, y2: y + dy, stroke: ink, 'stroke-width': width,
                    'vector-effect': 'non-scaling-stroke'}, group);
  }
}

function paint() {
  const root = element.querySelector('.stage');
  if (!root || !props.value) return;
  const {width, height, marks, point, box} = props.value;
  svg = root.querySelector('svg');
  if (!svg) {
    svg = made('svg', {tabindex: 0, role: 'application'}, root);
    made('image', {class: 'photo', preserveAspectRatio: 'none'}, svg);
    made('g', {class: 'marks'}, svg);
    made('g', {class: 'live'}, svg);
  }
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.setAttribute('aria-label', `the image, ${width} by ${height} pixels, ${marks.length} boxes. Arrow keys move the cross, `
    + 'Enter sets a point or a corner, P points, B draws a box, Escape clears');
  root.style.setProperty('--ratio', width / height);
  const photo = svg.querySelector('.photo');
  photo.setAttribute('width', width);
  photo.setAttribute('height', height);
  photo.style.imageRendering = side() < 256 ? 'pixelated' : 'auto';
  if (photo.getAttribute('href') !== props.picture) {
    photo.setAttribute('href', props.picture);
    cursor = corner = null;
  }
  const group = svg.querySelector('.marks');
  group.replaceChildren();
  for (const mark of marks) outline(group, mark.box, mark.color, mark.dashed);
  if (box) outline(group, box, '#F0E442', true);
  for (const mark of marks) if (mark.label) label(group, mark);
  if (point) cross(group, point, '#fff', .025);
  live();
}

function live(rectangle) {
  if (!svg) return;
  const group = svg.querySelector('.live');
  group.replaceChildren();
  if (rectangle) outline(group, rectangle, '#F0E442', false);
  if (corner) cross(group, corner, '#F0E442', .02);
  if (corner && cursor && document.activeElement === svg) outline(group, ordered(corner, cursor), '#F0E442', true);
  if (cursor && document.activeElement === svg) cross(group, cursor, '#7fe3ff', .04);
  for (const button of element.querySelectorAll('[data-mode]'))
    button.setAttribute('aria-pressed', String(button.dataset.mode === mode));
}

function tell(text) {
  const place = element.querySelector('.tell');
  if (place) place.textContent = text;
}

function ordered(a, b) {
  return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
}

function snapped(x, y) {
  const {width, height, snap} = props.value;
  const on = (value, top) => Math.min(Math.max(Math.round(value / snap) * snap, 0), top);
  return [on(x, width), on(y, height)];
}

function pixel(event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return snapped(at.x, at.y);
}

function finish(box) {
  corner = drag = null;
  if (box[2] - box[0] < 1 || box[3] - box[1] < 1) return live();
  tell(`box ${box.join(', ')}`);
  trigger('mark', {box});
  live();
}

function set(at) {
  if (mode === 'point') {
    const inside = [Math.min(at[0], props.value.width - 1), Math.min(at[1], props.value.height - 1)];
    tell(`point ${inside.join(', ')}`);
    return trigger('place', {point: inside});
  }
  if (corner) return finish(ordered(corner, at));
  corner = at;
  tell(`first corner ${at.join(', ')}; now the opposite one`);
  live();
}

function choose(name) {
  mode = name;
  corner = null;
  tell(name === 'box' ? 'Drag, or click two corners.' : 'Click a point; a drag draws a box.');
  live();
}

function onImage(event) { return svg && event.target instanceof Node && svg.contains(event.target); }

element.addEventListener('pointerdown', (event) => {
  if (!onImage(event) || event.button !== 0 || !event.isPrimary) return;
  drag = {from: pixel(event), x: event.clientX, y: event.clientY, moved: false};
  if (event.pointerType !== 'touch') svg.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (!drag || event.pointerType === 'touch') return;
  drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 5;
  if (drag.moved) live(ordered(drag.from, pixel(event)));
});
element.addEventListener('pointerup', (event) => {
  if (!drag) return;
  const {from, moved} = drag;
  drag = null;
  cursor = pixel(event);
  if (moved) finish(ordered(from, cursor)); else set(from);
});
element.addEventListener('pointercancel', () => { drag = null; live(); });
element.addEventListener('focusin', () => { if (svg && !cursor) cursor = snapped(props.value.width / 2, props.value.height / 2); live(); });
element.addEventListener('focusout', () => live());
element.addEventListener('keydown', (event) => {
  if (!onImage(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = Math.max(props.value.snap, Math.round(side() / 64)) * (event.shiftKey ? 4 : 1);
  const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
  const key = event.key.toLowerCase();
  if (event.key in moves) {
    cursor = snapped(cursor[0] + moves[event.key][0], cursor[1] + moves[event.key][1]);
    tell(`cross at ${cursor.join(', ')}`);
    live();
  } else if (event.key === 'Enter' || event.key === ' ') set(cursor);
  else if (key === 'p' || key === 'b') choose(key === 'p' ? 'point' : 'box');
  else if (event.key === 'Escape') { corner = null; trigger('clear', {}); live(); }
  else return;
  event.preventDefault();
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-mode], [data-clear]');
  if (!button) return;
  if (button.dataset.mode) return choose(button.dataset.mode);
  corner = null;
  tell('Cleared.');
  trigger('clear', {});
});
watch(['value', 'picture'], paint);
paint();
