#!/usr/bin/env node
// Teaches a server the classes of a folder, and asks it what images show.

import path from "node:path";
import { parseArgs } from "node:util";

import { status, type ServiceError } from "@grpc/grpc-js";

import { answered, connect, type Connection } from "./connection.js";
import { details, detailsOf, isStatus, type Details } from "./failures.js";
import { PredictRequest, type PredictResponse } from "./gen/inflora/v1/predictor_service.js";
import { TaskStage, TaskState, type Task } from "./gen/inflora/v1/task.js";
import { batches, labelled, learn, watch } from "./learning.js";

const USAGE = `usage: inflora-node [options] learn FOLDER      one sub-folder of images for each class
       inflora-node [options] predict FILE...

  --server HOST:PORT    default: localhost:50051
  --tls                 encrypt; authorities are those that Node knows
  --ca FILE             encrypt; the authority that signed the server's certificate
  --cert FILE           with --key: a certificate that says who is calling
  --key FILE
  --token-file FILE     a token that says who is calling`;

/** 5% of images of known classes have more: time to teach something. */
const NEW = 0.95;

/** An error whose message is all there is to say. */
class Failure extends Error {
  constructor(
    message: string,
    readonly exitCode = 1,
  ) {
    super(message);
  }
}

async function main(): Promise<void> {
  const { values, positionals } = commandLine();
  const [command, ...files] = positionals;
  if (values.help) {
    console.log(USAGE);
    return;
  }
  const [folder] = files;
  const learns = command === "learn" && files.length === 1;
  if (folder === undefined || !(learns || command === "predict")) throw new Failure(USAGE, 2);
  const connection = connect({ ...values, tokenFile: values["token-file"] });
  try {
    await (learns ? learnFolder(connection, folder) : predict(connection, files));
  } finally {
    connection.close();
  }
}

function commandLine() {
  const text = { type: "string" } as const;
  const flag = { type: "boolean" } as const;
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        server: { ...text, default: "localhost:50051" },
        tls: flag,
        ca: text,
        cert: text,
        key: text,
        "token-file": text,
        help: { ...flag, short: "h" },
      },
    });
  } catch (error) {
    throw new Failure(`${(error as Error).message}\n${USAGE}`, 2);
  }
}

async function learnFolder(connection: Connection, folder: string): Promise<void> {
  const examples = await labelled(folder);
  const onSent = (count: number) => show(`uploaded ${count} of ${examples.length} images`);
  let task = await naming(examples, () => learn(connection, examples, onSent));
  for await (task of watch(connection, task.name)) show(progressOf(task));
  endLine();
  if (task.state !== TaskState.TASK_STATE_PUBLISHED) throw new Failure(endOf(task));
  const labels = task.classes.map(({ label }) => label).join(", ");
  const accuracy = task.report?.heldOutAccuracy;
  const known = accuracy === undefined ? "" : `, held-out accuracy ${percent(accuracy)}`;
  console.log(`${path.basename(task.version)}: version with ${labels}${known}`);
}

/** Print a line for each file, in their order. */
async function predict(connection: Connection, files: readonly string[]): Promise<void> {
  for await (const batch of batches(files.map((file) => ({ file })))) {
    const request = PredictRequest.fromPartial({ images: batch.map(({ image }) => image), topK: 1 });
    const answer = await naming(batch, () =>
      answered<PredictResponse>((...call) => connection.predictor.predict(request, ...call)),
    );
    answer.predictions.forEach(({ scores: [best], novelty }, index) => {
      const sure = best === undefined ? "nothing" : `${best.label} ${percent(best.probability)}`;
      const unlike = novelty > NEW ? ", unlike anything learned" : "";
      console.log(`${batch[index]?.file}: ${sure}${unlike}`);
    });
  }
}

/** Have an error name the files that it is about: a server counts images. */
async function naming<T>(images: readonly { file: string }[], call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    if (!isStatus(error)) throw error;
    const found = detailsOf(error);
    const files = found.fields.flatMap(({ field }) => {
      const number = /^(?:examples|images)\[(\d+)\]/.exec(field)?.[1];
      return number === undefined ? [] : [images[Number(number)]?.file ?? field];
    });
    throw new Failure([...files, `${textOf(error)}${said(found)}`].join(": "));
  }
}

function textOf(error: ServiceError): string {
  return `${status[error.code]}: ${error.details}`;
}

/** Return in which fields the error is, and why it is one. */
function said({ reason, fields }: Details): string {
  const all = [reason, ...fields.map(({ field }) => field)].filter((one) => one !== "");
  return all.length === 0 ? "" : ` (${all.join(", ")})`;
}

function progressOf(task: Task): string {
  if (task.state !== TaskState.TASK_STATE_LEARNING) return nameOf(task.state);
  const { epoch, epochs, loss } = task;
  const training = epoch > 0 ? `, epoch ${epoch} of ${epochs}, loss ${loss.toFixed(3)}` : "";
  const stage = task.stage === TaskStage.TASK_STAGE_UNSPECIFIED ? "starting" : nameOf(task.stage);
  return `${stage}${training}, ${percent(task.fractionDone)} done`;
}

function endOf(task: Task): string {
  const { name, state, error } = task;
  const why = error === undefined ? "" : `: ${error.message}${said(details(error))}`;
  return `${name} ended as ${nameOf(state)}${why}`;
}

/** TASK_STATE_QUEUED is `queued`. */
function nameOf(value: string): string {
  return value.replace(/^TASK_(STATE|STAGE)_/, "").toLowerCase();
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}

let shown = "";

/** Say how far it has come: on a terminal in one line, else in a line for each change. */
function show(text: string): void {
  if (text === shown) return;
  shown = text;
  process.stderr.write(process.stderr.isTTY ? `\r\x1b[K${text}` : `${text}\n`);
}

function endLine(): void {
  if (process.stderr.isTTY && shown !== "") process.stderr.write("\n");
  shown = "";
}

try {
  await main();
} catch (error) {
  endLine();
  console.error(isStatus(error) ? textOf(error) : (error as Error).message);
  process.exitCode = error instanceof Failure ? error.exitCode : 1;
}
