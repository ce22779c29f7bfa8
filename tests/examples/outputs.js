// What a single file makes of images, in any ONNX Runtime of JavaScript.

/** Its outputs by name, as lists; images are float32 [B, 3, S, S], flat. */
export async function outputsOf(ort, model, images, side) {
  const session = await ort.InferenceSession.create(model);
  const shape = [images.length / (3 * side * side), 3, side, side];
  const outputs = await session.run({ images: new ort.Tensor("float32", images, shape) });
  return Object.fromEntries(Object.entries(outputs).map(([name, { data }]) => [name, Array.from(data, Number)]));
}
