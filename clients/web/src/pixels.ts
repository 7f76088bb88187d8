// From an encoded image, or a frame of a camera, to the pixels that a model takes.

import type { Picture } from "./messages";

// As much as a server takes by default (`Limits` in inflora_core/config.py).
const MOST_PIXELS = 64_000_000;
/** Longest side over shortest: the model resizes the shorter side to its own. */
const ASPECT = 100;

export interface Pixels {
  readonly width: number;
  readonly height: number;
  /** RGB, row after row. */
  readonly data: Uint8Array;
}

/**
 * Decode as the server does: upright as EXIF says, colours as they are stored, what is transparent in
 * front of white.
 *
 * @throws Error if it cannot be read.
 */
export async function pixelsOf(picture: Picture): Promise<Pixels> {
  const bitmap = picture instanceof Blob ? await decoded(picture) : picture;
  try {
    const { width, height } = bitmap;
    const size = `the image is ${width} x ${height} pixels`;
    if (width * height > MOST_PIXELS) {
      throw new Error(`${size}, more than ${MOST_PIXELS} in all: scale it down`);
    }
    if (Math.max(width, height) > ASPECT * Math.min(width, height)) {
      throw new Error(`${size}, one side more than ${ASPECT} times the other: crop it`);
    }
    const context = new OffscreenCanvas(width, height).getContext("2d", {
      // The browser must not keep on a GPU what is read right away.
      willReadFrequently: true,
      colorSpace: "srgb",
    });
    if (context === null) throw new Error("the browser has no memory for the image: scale it down");
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    const rgba = context.getImageData(0, 0, width, height).data;
    const data = new Uint8Array(width * height * 3);
    for (let from = 0, to = 0; to < data.length; from += 4, to += 3) {
      data[to] = rgba[from]!;
      data[to + 1] = rgba[from + 1]!;
      data[to + 2] = rgba[from + 2]!;
    }
    return { width, height, data };
  } finally {
    bitmap.close();
  }
}

async function decoded(file: Blob): Promise<ImageBitmap> {
  try {
    return await createImageBitmap(file, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
    });
  } catch (error) {
    throw new Error("this is no image that the browser can read: try JPEG, PNG or WebP", {
      cause: error,
    });
  }
}
