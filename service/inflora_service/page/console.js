// Asks the server how it is, again and again, and shows what is new. What it learned comes as parts of
// a page that the server has drawn; they are put in place only where they are others than before.

const POLL = 2000;
const SOON = 500;
const NOVEL = 0.95;
const MOST_ANSWERS = 30;
const TOKEN = "token";

const at = (id) => document.getElementById(id);
const shownViews = new Map();
let digest = "";
let server = null;
let timer = 0;
let asking = false;

class Refused extends Error {
  constructor(status, told, seconds) {
    super(told);
    this.status = status;
    this.seconds = seconds;
  }
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response.json();
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).message;
  } catch {
    // Plain text: it was refused before anybody looked at who asks.
  }
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

async function look() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  // Not all at the same moment, however many are open.
  let wait = POLL * (0.9 + 0.2 * Math.random());
  try {
    show(await ask(`/console/state?seen=${digest}`));
  } catch (error) {
    wait = Math.max(POLL, 1000 * (error.seconds ?? 0));
    if (error.status === 401) {
      askWho(error.message);
      wait = 0;
    } else if (error.status === 503 && server) {
      wait = SOON; // others were asking, too
    } else {
      trouble(error.status ? error.message : "The server cannot be reached; trying on.");
    }
  } finally {
    asking = false;
  }
  if (wait && !document.hidden) timer = setTimeout(look, wait);
}

function trouble(message) {
  at("problem").hidden = !message;
  // Said again by a screen reader if it is set again.
  if (at("problem").textContent !== message) at("problem").textContent = message;
  if (message) {
    at("version").className = "chip wrong";
    at("fresh").textContent = "";
  }
}

function askWho(message) {
  const tried = sessionStorage.getItem(TOKEN) !== null;
  const possible = !message.includes("--tls-client-ca");
  sessionStorage.removeItem(TOKEN);
  digest = "";
  at("shown").hidden = true;
  at("leave").hidden = true;
  at("sign-in").hidden = !possible;
  trouble(tried || !possible ? message : "");
  at("version").textContent = "Signed out";
  at("version").className = "chip off";
  at("about").textContent = "";
  at("fresh").textContent = "";
  if (possible) at("token").focus();
}

function show(state) {
  server = state.server;
  trouble(state.trouble);
  at("sign-in").hidden = true;
  at("shown").hidden = false;
  at("leave").hidden = sessionStorage.getItem(TOKEN) === null;
  showServer(state.server);
  if (state.story) showStory(state.story);
  digest = state.digest;
  showTasks(state.tasks);
  showLoad(state.load);
  at("fresh").textContent = new Date().toLocaleTimeString();
}

function showServer(now) {
  const chip = at("version");
  chip.textContent = now.version ? `Version ${now.version}` : "No version yet";
  chip.className = now.version ? (now.stands_in ? "chip wrong" : "chip") : "chip off";
  const about = [];
  if (now.version) about.push(`${now.classes} ${now.classes === 1 ? "class" : "classes"}`);
  if (now.stands_in) about.push("stands in for a damaged version: promote another");
  if (now.provider) about.push(now.provider.replace("ExecutionProvider", ""));
  about.push(now.predicts && now.learns ? "" : now.predicts ? "predicts only" : "learns only");
  if (now.following) {
    const { version, lag } = now.following;
    about.push(lag ? `${lag} s behind version ${version}` : `follows version ${version}`);
  }
  about.push(`release ${now.release}`);
  at("about").textContent = about.filter(Boolean).join(" \u00b7 ");
  at("drop").hidden = !now.predicts || !now.version;
  const cannot = at("cannot");
  cannot.hidden = !at("drop").hidden;
  cannot.textContent = now.predicts
    ? "Nothing can be asked before the first task is learned."
    : "This server learns only. Ask one that predicts.";
}

function showStory(story) {
  replace(at("tiles"), story.tiles);
  for (const place of document.querySelectorAll("[data-view]")) {
    replace(place, story.views[place.dataset.view]);
  }
}

// Only where it is another: what is open, scrolled or in focus stays so.
function replace(place, content) {
  if (shownViews.get(place) === content) return;
  shownViews.set(place, content);
  const open = place.querySelector("details")?.open;
  const parsed = new DOMParser().parseFromString(content, "text/html");
  place.replaceChildren(...parsed.body.childNodes);
  const details = place.querySelector("details");
  if (details && open) details.open = true;
}

function showTasks(tasks) {
  const running = tasks.running;
  at("running").hidden = !running;
  at("idle").hidden = Boolean(running);
  replace(
    at("idle"),
    server.learns
      ? "Nothing is being learned. A folder for each class, and <code>inflora learn FOLDER</code>, teach a task."
      : "This server follows another one, which learns.",
  );
  const queued = tasks.queued ? `, ${tasks.queued} more queued` : "";
  if (running) {
    at("task").textContent = running.name ?? "A task";
    at("task-what").textContent = running.what ? `${running.what}${queued}` : "";
    at("progress").value = running.fraction;
    at("stage").textContent = running.stage ? capital(running.stage) : tasks.told ? "Starting" : "";
    facts(at("learning"), [
      ["Done", `${Math.round(100 * running.fraction)}%`],
      ["Epoch", running.epochs ? `${running.epoch} of ${running.epochs}` : ""],
      ["Loss", running.loss && running.epoch ? running.loss.toFixed(3) : ""],
      ["Time left", running.left ? `about ${running.left}` : ""],
      ["Images", running.images ? String(running.images) : ""],
    ]);
  }
  if (tasks.told) {
    replace(at("tasks"), tasks.table || `<p class="empty">${noTasks()}</p>`);
  } else {
    replace(
      at("tasks"),
      '<p class="empty">What tasks are called is told to whoever has the role <code>learn</code>.</p>',
    );
  }
}

function noTasks() {
  return server.learns
    ? "No task was sent yet. Put images into a folder for each class, and run <code>inflora learn FOLDER</code>."
    : "Tasks are sent to the server that this one follows.";
}

function capital(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}

function facts(list, pairs) {
  const parts = [];
  for (const [name, value] of pairs) {
    if (!value) continue;
    const group = document.createElement("div");
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    group.append(dt, dd);
    parts.push(group);
  }
  list.replaceChildren(...parts);
}

function showLoad(load) {
  replace(at("latency"), load.picture);
  at("waiting").textContent =
    `${load.images.toFixed(1)} images a second; ${load.waiting} of at most ${load.waiting_limit} waiting; ` +
    `${load.failed.toFixed(1)} calls a second refused or failed.`;
}

async function classify(files) {
  for (const file of files) {
    const entry = at("answer").content.cloneNode(true).firstElementChild;
    entry.querySelector(".name").textContent = file.name;
    const picture = entry.querySelector("img");
    picture.src = URL.createObjectURL(file);
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src), { once: true });
    entry.querySelector(".by").textContent = "Asking";
    at("answers").prepend(entry);
    while (at("answers").children.length > MOST_ANSWERS) at("answers").lastElementChild.remove();
    at("answers").tabIndex = 0;
    try {
      if (file.size > server.image_bytes) {
        throw new Error(`It is larger than the ${server.image_bytes} bytes that an image may have.`);
      }
      const headers = { "Content-Type": "application/octet-stream" };
      showAnswer(entry, await patiently("/console/predict", { method: "POST", body: file, headers }));
    } catch (error) {
      const by = entry.querySelector(".by");
      by.textContent = error.message;
      by.className = "by wrong";
      at("said").textContent = `${file.name}: ${error.message}`;
      if (error.status === 401) {
        askWho(error.message);
        return;
      }
    }
  }
}

// Others may be asking, too: then it is only a matter of a moment.
async function patiently(path, options) {
  for (let left = 5; ; left -= 1) {
    try {
      return await ask(path, options);
    } catch (error) {
      if (!left || (error.status !== 503 && error.status !== 429)) throw error;
      await new Promise((go) => setTimeout(go, 1000 * (error.seconds || 0.5)));
    }
  }
}

function showAnswer(entry, answer) {
  const rows = answer.scores.map(({ label, probability }) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    const bar = document.createElement("td");
    const share = document.createElement("td");
    const filled = document.createElement("div");
    name.scope = "row";
    name.textContent = label;
    bar.className = "bar";
    filled.style.width = `${100 * probability}%`;
    bar.append(filled);
    share.className = "share";
    share.textContent = `${(100 * probability).toFixed(1)}%`;
    row.append(name, bar, share);
    return row;
  });
  entry.querySelector("tbody").replaceChildren(...rows);
  const by = entry.querySelector(".by");
  const novel = answer.novelty > NOVEL;
  const [best] = answer.scores;
  by.textContent = `Version ${answer.version} \u00b7 novelty ${answer.novelty.toFixed(2)}`;
  if (novel) {
    const mark = document.createElement("span");
    mark.className = "new";
    mark.textContent = " \u00b7 unlike anything learned";
    by.append(mark);
  }
  const name = entry.querySelector(".name").textContent;
  at("said").textContent =
    `${name}: ${best.label}, ${Math.round(100 * best.probability)}%${novel ? ", unlike anything learned" : ""}`;
}

at("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token").value.trim());
  at("token").value = "";
  look();
});
at("leave").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  look();
});
at("choose").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", () => {
  classify([...at("files").files]);
  at("files").value = "";
});
const drop = at("try");
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
drop.addEventListener("dragleave", () => at("drop").classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  if (!at("drop").hidden) classify([...event.dataTransfer.files]);
});
// A file that misses its place must not replace the page.
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => event.preventDefault());
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});
look();
