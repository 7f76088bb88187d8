// The page: which model is in use, and what is asked of it.
//
// Of the address, `?models=folder/` says where models lie (relative to the page; default: models/),
// `?poll=seconds` how often to look for another (default: 5).

import { Camera } from "./camera";
import { Follower } from "./follower";
import { reason } from "./messages";
import { Model } from "./model";
import { byId, Entry, percent, sentence, show } from "./view";

/** Images that stay on the page, and are asked again of each new version. */
const KEPT = 60;

const options = new URLSearchParams(location.search);
const folder = new URL(`${options.get("models") ?? "models"}/`.replace(/\/+$/, "/"), location.href);
const poll = Number(options.get("poll")) || 5;

const versionLine = byId("version", HTMLElement);
const sourceLine = byId("source", HTMLElement);
const problemLine = byId("problem", HTMLElement);
const said = byId("said", HTMLElement);
const known = byId("known", HTMLDetailsElement);
const loading = byId("loading", HTMLElement);
const progress = byId("progress", HTMLProgressElement);
const progressLabel = loading.querySelector("label")!;
const drop = byId("drop", HTMLElement);
const files = byId("files", HTMLInputElement);
const live = byId("live", HTMLElement);
const seen = byId("seen", HTMLElement);
const cameraButton = byId("camera", HTMLButtonElement);
const followButton = byId("follow", HTMLButtonElement);
const results = byId("results", HTMLOListElement);
const camera = new Camera(byId("video", HTMLVideoElement));

let model: Model | undefined;
let entries: Entry[] = [];

/** What is wrong, by what it is about. */
const problems = new Map<"update" | "file" | "camera", string>();

const follower = new Follower(folder, poll, {
  onProgress: (version, share) => progressed(`Fetching version ${version}`, share),
  onModel: (next) => use(next, "following the server"),
  onProblem: (message) => {
    loading.hidden = true;
    complain("update", model ? `No update: ${message}. ${goesOn(model)}` : message);
  },
  onLooked: () => complain("update", ""),
});

/** Have another model answer from now on. What the one before was asked, it still answers. */
function use(next: Model, source: string): void {
  model?.retire();
  model = next;
  versionLine.textContent = `Version ${next.version}`;
  sourceLine.textContent = `${next.classes.length} classes, ${source}`;
  loading.hidden = true;
  known.hidden = false;
  known.querySelector("summary")!.textContent = `All ${next.classes.length} classes`;
  known.querySelector("ul")!.replaceChildren(
    ...next.classes.map((label) => {
      const item = document.createElement("li");
      item.textContent = label;
      return item;
    }),
  );
  say(`Version ${next.version} answers now`);
  for (const entry of entries) void classify(entry);
}

async function classify(entry: Entry): Promise<void> {
  const asked = model;
  if (asked === undefined) return; // it will be asked when there is one
  try {
    const answer = await asked.classify(entry.file);
    // Of a version that was replaced meanwhile, the answer would come after that of the next.
    if (asked !== model) return;
    entry.show(answer);
    say(`${entry.file.name}: ${sentence(answer)}`);
  } catch (error) {
    if (asked === model) entry.fail(reason(error));
  }
}

function take(chosen: Iterable<File>): void {
  for (const file of chosen) {
    if (file.name.toLowerCase().endsWith(".onnx")) {
      void takeModel(file);
      continue;
    }
    const entry = new Entry(file);
    entries.unshift(entry);
    results.prepend(entry.element);
    void classify(entry);
  }
  for (const old of entries.slice(KEPT)) old.remove();
  entries = entries.slice(0, KEPT);
}

/** Use a file that somebody chose, and follow nobody until told to. */
async function takeModel(file: File): Promise<void> {
  progressed(`Loading ${file.name}`, null);
  try {
    const next = await Model.load(await file.arrayBuffer());
    follower.stop();
    followButton.hidden = false;
    complain("update", "");
    complain("file", "");
    use(next, `from ${file.name}`);
  } catch (error) {
    loading.hidden = true;
    complain("file", `${file.name}: ${reason(error)}.${model ? ` ${goesOn(model)}` : ""}`);
  }
}

async function watch(): Promise<void> {
  let label = "";
  for await (const frame of camera.frames()) {
    const asked = model;
    if (asked === undefined) {
      frame.close();
      continue;
    }
    try {
      const answer = await asked.classify(frame);
      if (!camera.isOn) return;
      show(answer, seen);
      if (answer.scores[0].label !== label) say(`Camera: ${sentence(answer)}`);
      label = answer.scores[0].label;
    } catch (error) {
      // Of a version that was replaced meanwhile, it is no concern: the next frame is another's.
      if (asked === model) seen.textContent = reason(error);
    }
  }
}

async function toggleCamera(): Promise<void> {
  if (camera.isOn) {
    camera.stop();
    showCamera();
    return;
  }
  // Until the browser has asked: a second click would start a second stream.
  cameraButton.disabled = true;
  try {
    await camera.start();
    complain("camera", "");
    showCamera();
    await watch();
  } catch (error) {
    camera.stop();
    complain("camera", reason(error));
    showCamera();
  }
}

/** Show whether the camera is on. */
function showCamera(): void {
  live.hidden = !camera.isOn;
  cameraButton.disabled = false;
  cameraButton.ariaPressed = String(camera.isOn);
  cameraButton.textContent = camera.isOn ? "Stop the camera" : "Use the camera";
  seen.replaceChildren();
}

function progressed(what: string, share: number | null): void {
  loading.hidden = false;
  progressLabel.textContent = share === null ? `${what} …` : `${what}: ${percent(share)}`;
  if (share === null) progress.removeAttribute("value");
  else progress.value = share;
}

/** Say what is wrong with something; "": nothing is. */
function complain(about: "update" | "file" | "camera", message: string): void {
  problems.set(about, message);
  const all = [...problems.values()].filter((one) => one !== "").join(" ");
  if (problemLine.textContent === all) return; // it is read out when it changes
  problemLine.textContent = all;
  problemLine.hidden = all === "";
}

function goesOn(inUse: Model): string {
  return `Version ${inUse.version} goes on answering.`;
}

function say(text: string): void {
  said.textContent = text;
}

byId("choose", HTMLButtonElement).addEventListener("click", () => files.click());
files.addEventListener("change", () => {
  take(files.files ?? []);
  files.value = ""; // the same file may be chosen again
});
cameraButton.addEventListener("click", () => void toggleCamera());
followButton.addEventListener("click", () => {
  followButton.hidden = true;
  void follower.start();
});

// Beside the zone, too: a browser would leave the page for a file that is dropped there.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer?.files ?? []);
});

void follower.start();
