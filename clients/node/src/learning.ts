// From a folder to a task: an upload that goes on where it broke off, and how the task does.

import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { readdir, readFile } from "node:fs/promises";
import path from "node:path";

import { Metadata, status } from "@grpc/grpc-js";

import { answered, type Connection } from "./connection.js";
import { Patience, isStatus } from "./failures.js";
import {
  LearnTaskRequest,
  type GetTaskResponse,
  type LearnTaskResponse,
  type QueryUploadResponse,
  type WatchTaskResponse,
} from "./gen/inflora/v1/learner_service.js";
import { TaskSpec, type Task } from "./gen/inflora/v1/task.js";

/** Messages of 256 KiB to 1 MiB stream best. */
const BATCH_BYTES = 512 * 1024;

/** As many as a server classifies in one call, unless it is set to another number. */
const BATCH_IMAGES = 256;

const IMAGE = /\.(bmp|jpe?g|png|webp)$/i;

/** An image file and its class. */
export interface Labelled {
  readonly file: string;
  readonly label: string;
}

/**
 * List a folder's images, of which each is in a sub-folder that is called like its class.
 *
 * @throws Error if there is no such folder, or one without images.
 */
export async function labelled(folder: string): Promise<Labelled[]> {
  const found: Labelled[] = [];
  for (const entry of await visible(folder)) {
    if (!entry.isDirectory()) continue;
    const inside = path.join(folder, entry.name);
    const images = (await visible(inside)).filter(({ name }) => IMAGE.test(name));
    if (images.length === 0) throw new Error(`${inside} holds no images (JPEG, PNG, WebP or BMP)`);
    // File systems differ in the Unicode form of names; a server knows labels in NFC.
    const label = entry.name.normalize("NFC");
    found.push(...images.map(({ name }) => ({ file: path.join(inside, name), label })));
  }
  if (found.length === 0) throw new Error(`${folder} has no sub-folders: make one for each class`);
  return found;
}

async function visible(folder: string) {
  const entries = await readdir(folder, { withFileTypes: true });
  return entries
    .filter(({ name }) => !name.startsWith("."))
    .sort((a, b) => (a.name < b.name ? -1 : 1)); // an upload that goes on needs the same order
}

/** Read files one after the other, and yield them in batches that stream well. */
export async function* batches<Item extends { readonly file: string }>(
  items: readonly Item[],
): AsyncGenerator<(Item & { readonly image: Buffer })[]> {
  let batch: (Item & { readonly image: Buffer })[] = [];
  let size = 0;
  for (const item of items) {
    const image = await readFile(item.file);
    const full = size + image.length > BATCH_BYTES || batch.length === BATCH_IMAGES;
    if (full && batch.length > 0) {
      yield batch;
      [batch, size] = [[], 0];
    }
    batch.push({ ...item, image });
    size += image.length;
  }
  if (batch.length > 0) yield batch;
}

/**
 * Upload a task, and go on where that broke off; return the task once it is stored durably.
 *
 * @param onSent Is told how many examples are on their way.
 * @throws ServiceError if the server refuses it, or is away for too long.
 */
export async function learn(
  connection: Connection,
  examples: readonly Labelled[],
  onSent: (count: number) => void,
): Promise<Task> {
  const requestId = randomUUID(); // a broken upload is known by it
  const patience = new Patience();
  for (let most = -1; ; ) {
    try {
      const there = await uploaded(connection, requestId);
      if (there.task !== "") return await taskOf(connection, there.task);
      // Patience with uploads that never get further must end.
      if (there.exampleCount > most) patience.heard();
      most = Math.max(most, there.exampleCount);
      return await send(connection, messages(examples, requestId, there.exampleCount, onSent));
    } catch (error) {
      await patience.after(error);
    }
  }
}

/** Return how much of an upload the server has, and whether it became a task. */
async function uploaded(
  { learner }: Connection,
  requestId: string,
): Promise<Pick<QueryUploadResponse, "exampleCount" | "task">> {
  try {
    const request = { parent: "", requestId };
    return await answered<QueryUploadResponse>((...call) => learner.queryUpload(request, ...call));
  } catch (error) {
    if (isStatus(error) && error.code === status.NOT_FOUND) return { exampleCount: 0, task: "" };
    throw error;
  }
}

async function taskOf({ learner }: Connection, name: string): Promise<Task> {
  const { task } = await answered<GetTaskResponse>((...call) => learner.getTask({ name }, ...call));
  return told(task);
}

function told(task: Task | undefined): Task {
  if (task === undefined) throw new Error("the server's answer has no task");
  return task;
}

async function* messages(
  examples: readonly Labelled[],
  requestId: string,
  resumeFrom: number,
  onSent: (count: number) => void,
): AsyncGenerator<LearnTaskRequest> {
  yield { payload: { $case: "spec", value: TaskSpec.fromPartial({ requestId, resumeFrom }) } };
  let count = resumeFrom;
  for await (const batch of batches(examples.slice(resumeFrom))) {
    yield { payload: { $case: "examples", value: { examples: batch } } };
    count += batch.length;
    onSent(count);
  }
  // Without it, a connection that broke could look like a finished upload.
  yield { payload: { $case: "end", value: { exampleCount: count } } };
}

/** Send one upload. A message is made when there is room for it on the line. */
function send({ streams }: Connection, outgoing: AsyncIterable<LearnTaskRequest>): Promise<Task> {
  return new Promise((resolve, reject) => {
    const answer = new AbortController();
    const { signal } = answer;
    const call = streams.learnTask((error: Error | null, response: LearnTaskResponse) => {
      if (error !== null) reject(error);
      else resolve(told(response.task));
      answer.abort(); // what is not sent yet, nobody wants any more
    });
    const write = async () => {
      for await (const message of outgoing) {
        if (signal.aborted) return;
        if (!call.write(message)) await once(call, "drain", { signal });
      }
      call.end();
    };
    write().catch((error: unknown) => {
      reject(error); // a file that cannot be read; without effect after an answer
      call.cancel();
    });
  });
}

/** Yield a task whenever it changes, until it has ended. */
export async function* watch({ streams }: Connection, name: string): AsyncGenerator<Task> {
  const patience = new Patience();
  for (;;) {
    const call = streams.watchTask({ name }, new Metadata());
    try {
      for await (const { task } of call as AsyncIterable<WatchTaskResponse>) {
        patience.heard();
        yield told(task);
      }
      return;
    } catch (error) {
      await patience.after(error);
    } finally {
      call.cancel();
    }
  }
}
