// How answers look.

import type { Answer } from "./messages";

const SHOWN = 5;

/** 5% of images of known classes have more: time to teach something. */
const NEW = 0.95;

const SMALL = 96;

/** Return the element of an id; the page has it. */
export function byId<T extends HTMLElement>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`the page has no ${id}`);
  return element;
}

/** Return a number of 0 to 1 as a percentage. */
export function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}

/** Return an answer in one sentence. */
export function sentence(answer: Answer): string {
  const [best] = answer.scores;
  const unlike = answer.novelty > NEW ? ", unlike anything learned" : "";
  return `${best.label}, ${percent(best.probability)}${unlike}`;
}

/** Put an answer in place of all that an element holds. */
export function show(answer: Answer, into: HTMLElement): void {
  const template = byId("answer", HTMLTemplateElement);
  const content = document.importNode(template.content, true);
  const [best] = answer.scores;
  part(content, ".best strong").textContent = best.label;
  part(content, ".best .share").textContent = percent(best.probability);
  part(content, ".new").hidden = answer.novelty <= NEW;
  part(content, "tbody").replaceChildren(
    ...answer.scores.slice(0, SHOWN).map(({ label, probability }) => {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = label;
      fill(name, probability);
      row.append(name);
      row.insertCell().textContent = percent(probability);
      return row;
    }),
  );
  fill(part(content, ".novelty .bar"), answer.novelty);
  part(content, ".novelty .value").textContent = answer.novelty.toFixed(2);
  part(content, ".by").textContent = `Version ${answer.version}`;
  into.replaceChildren(content);
}

/** One image with its answer, in the list of results. */
export class Entry {
  readonly element = document.createElement("li");
  private readonly answer = document.createElement("div");
  private readonly address: string;

  constructor(readonly file: File) {
    this.address = URL.createObjectURL(file);
    const picture = new Image();
    picture.alt = "";
    picture.addEventListener("load", () => {
      picture.classList.toggle("small", Math.max(picture.naturalWidth, picture.naturalHeight) <= SMALL);
    });
    picture.addEventListener("error", () => picture.remove());
    picture.src = this.address;
    const name = document.createElement("p");
    name.className = "name";
    name.textContent = file.name;
    const body = document.createElement("div");
    body.className = "body";
    body.append(name, this.answer);
    this.element.append(picture, body);
    this.say("waiting", "Waiting for the model …");
  }

  show(answer: Answer): void {
    show(answer, this.answer);
  }

  fail(message: string): void {
    this.say("wrong", message);
  }

  /** Take it out of the list, and its image out of memory. */
  remove(): void {
    this.element.remove();
    URL.revokeObjectURL(this.address);
  }

  private say(kind: string, text: string): void {
    const paragraph = document.createElement("p");
    paragraph.className = kind;
    paragraph.textContent = text;
    this.answer.replaceChildren(paragraph);
  }
}

/** Draw a bar; the number beside it says the same. */
function fill(element: HTMLElement, share: number): void {
  element.style.setProperty("--share", String(share));
}

function part(content: DocumentFragment, selector: string): HTMLElement {
  const found = content.querySelector<HTMLElement>(selector);
  if (found === null) throw new Error(`an answer has no ${selector}`);
  return found;
}
