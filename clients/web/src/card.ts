// What an ONNX file says of itself: onnxruntime-web does not tell. A file is a protobuf message, of
// which a few bytes are looked at; the weights between them are stepped over.

import type { Card } from "./messages";

// Fields of ModelProto and of StringStringEntryProto in onnx.proto.
const METADATA = 14;
const KEY = 1;
const VALUE = 2;

const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

/**
 * Read the version and the class names.
 *
 * @throws Error if this is no model of InfLoRA Server.
 */
export function readCard(content: Uint8Array): Card {
  const said = new Map<string, string>();
  const text = new TextDecoder();
  try {
    for (const [field, entry] of fields(content)) {
      if (field !== METADATA) continue;
      const pair = new Map(fields(entry));
      said.set(text.decode(pair.get(KEY)), text.decode(pair.get(VALUE)));
    }
    const version = Number(said.get("version"));
    const classes: unknown = JSON.parse(said.get("classes") ?? "null");
    if (!Number.isInteger(version)) throw new Error("it has no version");
    if (!isStrings(classes) || classes.length === 0) throw new Error("it names no classes");
    return { version, classes };
  } catch (error) {
    throw new Error(
      "the file is no model of InfLoRA Server, or is damaged: export one with `inflora export`",
      { cause: error },
    );
  }
}

function isStrings(value: unknown): value is string[] {
  return Array.isArray(value) && value.every((one) => typeof one === "string");
}

/** Yield the fields of a message that hold bytes, as they lie in it. */
function* fields(message: Uint8Array): Generator<[number, Uint8Array]> {
  let at = 0;
  const varint = (): number => {
    // Not by shifts, which JavaScript makes with 32 bits; lengths go to 2^31.
    for (let value = 0, unit = 1, size = 0; size < 10; size += 1, unit *= 128) {
      const byte = message[at++];
      if (byte === undefined) break;
      value += (byte % 128) * unit;
      if (byte < 128) return value;
    }
    throw new Error("the message is cut short");
  };
  while (at < message.length) {
    const tag = varint();
    const field = Math.floor(tag / 8);
    switch (tag % 8) {
      case VARINT:
        varint();
        break;
      case FIXED64:
        at += 8;
        break;
      case FIXED32:
        at += 4;
        break;
      case BYTES: {
        const end = varint() + at;
        if (end > message.length) throw new Error("the message is cut short");
        yield [field, message.subarray(at, end)];
        at = end;
        break;
      }
      default:
        throw new Error(`wire type ${tag % 8}`);
    }
  }
}
