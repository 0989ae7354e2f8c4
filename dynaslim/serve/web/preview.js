// A picture as the network sees it: the middle square, in as many pixels as the network takes.

/**
 * Draw a picture into a canvas; resolves to the picture's own size {width, height}, or to null
 * where this browser cannot decode it (the server may well).
 */
export async function drawSeen(canvas, blob, model) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    canvas.width = canvas.height = 0;
    return null;
  }
  const size = model.image_size_px;
  const side = Math.min(bitmap.width, bitmap.height);
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (model.in_channels === 1) context.filter = "grayscale(1)";
  const [x, y] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  context.drawImage(bitmap, x, y, side, side, 0, 0, size, size);
  const natural = { width: bitmap.width, height: bitmap.height };
  bitmap.close();
  return natural;
}
