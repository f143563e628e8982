// Runs an exported model: reads the file that ONNX writes and executes the few operators that our lists are made of.
"use strict";

// ---- the file: a protobuf, read as {field number: [values]}

function message(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), fields = {};
  let at = 0;
  const whole = () => {
    let value = 0n, shift = 0n, byte;
    do { byte = bytes[at++]; value |= BigInt(byte & 127) << shift; shift += 7n; } while (byte > 127);
    return Number(BigInt.asIntN(64, value));
  };
  while (at < bytes.length) {
    const key = whole(), kind = key & 7;
    let value;
    if (kind === 0) value = whole();
    else if (kind === 1) { value = view.getFloat64(at, true); at += 8; }
    else if (kind === 5) { value = view.getFloat32(at, true); at += 4; }
    else if (kind === 2) { const size = whole(); value = bytes.subarray(at, at + size); at += size; }
    else throw new Error("this is no ONNX file");
    (fields[key >>> 3] ||= []).push(value);
  }
  return fields;
}

const text = (bytes) => new TextDecoder().decode(bytes);
const numbers = (values = []) => values.flatMap((v) => (typeof v === "number" ? [v] : packed(v)));

function packed(bytes) {  // whole numbers laid end to end
  const found = [];
  for (let at = 0, start = 0; at < bytes.length; at++)
    if (bytes[at] < 128) {
      found.push(message(Uint8Array.of(8, ...bytes.subarray(start, at + 1)))[1][0]);
      start = at + 1;
    }
  return found;
}

const KINDS = { 1: Float32Array, 2: Uint8Array, 3: Int8Array, 5: Int16Array, 6: Int32Array, 7: BigInt64Array, 9: Uint8Array };

function tensor(bytes) {
  const field = message(bytes), kind = KINDS[field[2][0]];
  if (!kind || !field[9]) throw new Error(`a tensor of type ${field[2][0]} cannot be read`);
  const raw = new kind(field[9][0].slice().buffer);
  return { name: text(field[8][0]), dims: numbers(field[1]), data: kind === BigInt64Array ? Int32Array.from(raw, Number) : raw };
}

function attribute(bytes) {
  const field = message(bytes);
  return [text(field[1][0]), field[8] ? numbers(field[8]) : field[4] ? text(field[4][0]) : (field[3] || field[2] || [0])[0]];
}

// ---- the operators: of tensors {dims, data} and of attributes

const product = (dims) => dims.reduce((a, b) => a * b, 1);
const from = (axis, dims) => (axis < 0 ? axis + dims.length : axis);
const around = (dims, axis) => [product(dims.slice(0, axis)), dims[axis], product(dims.slice(axis + 1))];

function each(Kind, f) {  // number by number; what is too small is repeated
  return (inputs) => {
    const rank = Math.max(...inputs.map((x) => x.dims.length));
    const wide = inputs.map((x) => Array(rank - x.dims.length).fill(1).concat(x.dims));
    const dims = Array.from({ length: rank }, (_, d) => Math.max(...wide.map((w) => w[d])));
    const [a, b, c] = inputs.map((x) => x.data), out = new Kind(product(dims));  // f is of one, two or three numbers
    if (inputs.every((x) => x.data.length === out.length)) {
      for (let i = 0; i < out.length; i++) out[i] = f(a[i], b && b[i], c && c[i]);
      return { dims, data: out };
    }
    const step = wide.map((w) => w.map((n, d) => (n === 1 ? 0 : product(w.slice(d + 1)))));
    const last = rank - 1, width = dims[last], [sa, sb, sc] = step.map((w) => w[last]), at = [0, 0, 0], place = Array(rank).fill(0);
    for (let i = 0; i < out.length; i += width) {
      for (let j = 0, [p, q, r] = at; j < width; j++, p += sa, q += sb, r += sc) out[i + j] = f(a[p], b && b[q], c && c[r]);
      for (let d = last - 1; d >= 0; d--) {
        const full = ++place[d] === dims[d];
        for (let k = 0; k < step.length; k++) at[k] += full ? -step[k][d] * (dims[d] - 1) : step[k][d];
        if (!full) break;
        place[d] = 0;
      }
    }
    return { dims, data: out };
  };
}

function matmul([a, b]) {  // [..., n, k] and [..., k, m]; the leading places of one may be missing
  const n = a.dims.at(-2), k = a.dims.at(-1), m = b.dims.at(-1);
  const lead = a.dims.length >= b.dims.length ? a.dims.slice(0, -2) : b.dims.slice(0, -2);
  const blocks = product(lead), out = new Float32Array(blocks * n * m);
  for (let g = 0; g < blocks; g++) {
    const ga = (g * n * k) % a.data.length, gb = (g * k * m) % b.data.length;
    for (let i = 0; i < n; i++) for (let j = 0; j < k; j++) {
      const x = a.data[ga + i * k + j];
      if (x === 0) continue;
      for (let o = (g * n + i) * m, r = gb + j * m, end = r + m; r < end; r++, o++) out[o] += x * b.data[r];
    }
  }
  return { dims: [...lead, n, m], data: out };
}

function gather([x, places], { axis = 0 }) {
  const [outer, size, inner] = around(x.dims, from(axis, x.dims)), count = places.data.length;
  const out = new x.data.constructor(outer * count * inner);
  for (let o = 0; o < outer; o++) for (let p = 0; p < count; p++) {
    const start = (o * size + (places.data[p] < 0 ? places.data[p] + size : places.data[p])) * inner;
    out.set(x.data.subarray(start, start + inner), (o * count + p) * inner);
  }
  return { dims: [...x.dims.slice(0, from(axis, x.dims)), ...places.dims, ...x.dims.slice(from(axis, x.dims) + 1)], data: out };
}

function slice([x, starts, ends, axes]) {
  return [...axes.data].reduce((y, a, i) => {
    const axis = from(a, y.dims), size = y.dims[axis], bound = (v) => Math.min(Math.max(v < 0 ? v + size : v, 0), size);
    const first = bound(starts.data[i]), count = bound(ends.data[i]) - first;
    return gather([y, { dims: [count], data: Int32Array.from({ length: count }, (_, p) => first + p) }], { axis });
  }, x);
}

function sum([x, axes], { keepdims = 1 }) {
  return [...axes.data].map((a) => from(a, x.dims)).sort((a, b) => b - a).reduce((y, axis) => {
    const [outer, size, inner] = around(y.dims, axis), out = new Float32Array(outer * inner);
    for (let o = 0; o < outer; o++) for (let s = 0; s < size; s++) for (let i = 0; i < inner; i++) out[o * inner + i] += y.data[(o * size + s) * inner + i];
    return { dims: [...y.dims.slice(0, axis), ...(keepdims ? [1] : []), ...y.dims.slice(axis + 1)], data: out };
  }, x);
}

function transpose([x], { perm }) {
  const step = x.dims.map((_, d) => product(x.dims.slice(d + 1))), dims = perm.map((p) => x.dims[p]);
  const out = new x.data.constructor(x.data.length), place = dims.map(() => 0);
  for (let i = 0, at = 0; i < out.length; i++) {
    out[i] = x.data[at];
    for (let d = dims.length - 1; d >= 0; d--) {
      at += step[perm[d]];
      if (++place[d] < dims[d]) break;
      at -= step[perm[d]] * dims[d];
      place[d] = 0;
    }
  }
  return { dims, data: out };
}

function along(f) {  // row by row of the last axis
  return ([x, ...more], attributes) => {
    const size = x.dims.at(-1), out = new Float32Array(x.data.length);
    for (let at = 0; at < out.length; at += size) f(x.data.subarray(at, at + size), out.subarray(at, at + size), more, attributes);
    return { dims: x.dims, data: out };
  };
}

const softmax = along((x, out) => {
  let most = -Infinity, total = 0;
  for (const v of x) most = Math.max(most, v);
  for (let i = 0; i < x.length; i++) total += out[i] = Math.exp(x[i] - most);
  for (let i = 0; i < x.length; i++) out[i] /= total;
});

const normalise = along((x, out, [weight, bias], { epsilon }) => {
  const mean = x.reduce((a, b) => a + b, 0) / x.length, spread = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
  for (let i = 0; i < x.length; i++) out[i] = ((x[i] - mean) / Math.sqrt(spread + epsilon)) * weight.data[i] + bias.data[i];
});

function scatter([x, places, values], { axis, reduction }) {
  if (reduction !== "add" || x.dims.length !== 2 || from(axis, x.dims) !== 1) throw new Error("ScatterElements only adds along rows here");
  const out = x.data.slice(), width = places.dims[1];
  places.data.forEach((place, i) => { out[Math.floor(i / width) * x.dims[1] + place] += values.data[i]; });
  return { dims: x.dims, data: out };
}

function reshape([x, shape]) {
  const dims = [...shape.data].map((n, d) => (n === 0 ? x.dims[d] : n)), rest = product(dims.filter((n) => n !== -1));
  return { dims: dims.map((n) => (n === -1 ? x.data.length / rest : n)), data: x.data };
}

function unsqueeze([x, axes]) {
  const dims = [...x.dims];
  for (const axis of [...axes.data].sort((a, b) => a - b)) dims.splice(axis < 0 ? axis + dims.length + 1 : axis, 0, 1);
  return { dims, data: x.data };
}

function concat(inputs, { axis }) {
  const at = from(axis, inputs[0].dims), parts = inputs.map((x) => around(x.dims, at)), width = parts.map(([, size, inner]) => size * inner);
  const whole = width.reduce((a, b) => a + b, 0), out = new inputs[0].data.constructor(whole * parts[0][0]);
  let column = 0;
  inputs.forEach((x, k) => {
    for (let o = 0; o < parts[0][0]; o++) out.set(x.data.subarray(o * width[k], (o + 1) * width[k]), o * whole + column);
    column += width[k];
  });
  return { dims: inputs[0].dims.map((n, d) => (d === at ? parts.reduce((a, p) => a + p[1], 0) : n)), data: out };
}

const F = Float32Array, OPERATORS = {
  Add: each(F, (a, b) => a + b), Sub: each(F, (a, b) => a - b), Mul: each(F, (a, b) => a * b), Div: each(F, (a, b) => a / b),
  Max: each(F, (a, b) => Math.max(a, b)), Min: each(F, (a, b) => Math.min(a, b)), Exp: each(F, Math.exp), Log: each(F, Math.log), Sqrt: each(F, Math.sqrt), Tanh: each(F, Math.tanh),
  Sigmoid: each(F, (a) => 1 / (1 + Math.exp(-a))), Relu: each(F, (a) => Math.max(a, 0)),
  Equal: each(Uint8Array, (a, b) => a === b), Less: each(Uint8Array, (a, b) => a < b), Greater: each(Uint8Array, (a, b) => a > b), Where: each(F, (a, b, c) => (a ? b : c)),
  Cast: (inputs, { to }) => each(to === 1 ? F : Int32Array, (a) => a)(inputs),
  MatMul: matmul, Gather: gather, Slice: slice, ReduceSum: sum, Transpose: transpose, Softmax: softmax, LayerNormalization: normalise,
  ScatterElements: scatter, Reshape: reshape, Unsqueeze: unsqueeze, Concat: concat,
};

// ---- the graph

function load(bytes) {  // a function of codes, the latest last, that gives the scores of all products
  const graph = message(message(bytes)[7][0]), values = new Map(graph[5].map(tensor).map((t) => [t.name, t]));
  const nodes = graph[1].map(message).map((n) => {
    const kind = text(n[4][0]);
    if (!OPERATORS[kind]) throw new Error(`unknown operator ${kind}; known: ${Object.keys(OPERATORS).join(", ")}`);
    return { run: OPERATORS[kind], inputs: n[1].map(text), output: text(n[2][0]), attributes: Object.fromEntries((n[5] || []).map(attribute)) };
  });
  const work = (node, known) => known.set(node.output, node.run(node.inputs.map((name) => known.get(name)), node.attributes));
  const ready = nodes.filter((node) => { const all = node.inputs.every((name) => values.has(name)); if (all) work(node, values); return !all; });  // what follows from constants is done once
  const dims = message(message(message(message(graph[11][0])[2][0])[1][0])[2][0])[1].map((d) => (message(d)[1] || [0])[0]);  // input, type, tensor, shape
  const places = dims[1], output = text(message(graph[12][0])[1][0]);
  return (codes, empty) => {
    const basket = Array(places).fill(empty).concat(codes).slice(-places), known = new Map(values);
    known.set("basket", { dims: [1, places], data: Int32Array.from(basket) });
    for (const node of ready) work(node, known);
    return known.get(output).data;
  };
}

function best(scores, codes, k) {  // the k best products that are not in the basket
  const had = new Set(codes);
  return [...scores.keys()].filter((code) => !had.has(code)).sort((a, b) => scores[b] - scores[a] || a - b).slice(0, k);
}
