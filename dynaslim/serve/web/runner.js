// Sends the pictures that wait, in chunks that the server takes, one request after the other.

import { ApiError, predict } from "./api.js";
import { bytes } from "./format.js";

const PER_PICTURE_BYTES = 512; // what multipart adds to a picture, a long file name included
const LARGEST_CHUNK = 32; // of more the first answers would be long in coming

export class Runner {
  /**
   * `settings()` gives {budget, topK, limits, first}: `first` is the picture that is looked at,
   * which goes ahead of the others, alone. `onChange()` is called whenever something is known
   * anew; `onAnswer(answer)` for every answer of the server; `onDone()` when nothing waits any
   * more, `onTrouble(error)` when sending had to stop before; `onWait(seconds, message)` when the
   * server asked for patience.
   */
  constructor(collection, { settings, onChange, onAnswer, onDone, onTrouble, onWait }) {
    this.collection = collection;
    this.settings = settings;
    this.onChange = onChange;
    this.onAnswer = onAnswer;
    this.onDone = onDone;
    this.onTrouble = onTrouble;
    this.onWait = onWait;
    this.done = 0; // pictures of this run
    this.running = null; // what stops the run that is under way
  }

  /** Send what waits, unless that is under way. */
  async wake() {
    if (this.running) return;
    const controller = new AbortController();
    this.running = controller;
    this.done = 0;
    this.onChange();
    let trouble = null;
    try {
      for (let chunk; (chunk = this.#next()).length; ) {
        await this.#send(chunk, controller.signal);
        this.onChange();
      }
    } catch (error) {
      trouble = error;
    }
    if (this.running !== controller) return; // another run has taken over
    this.running = null;
    this.onChange();
    if (trouble) this.onTrouble(trouble);
    else this.onDone();
  }

  /** All pictures once more, for another budget; an answer that is on its way counts no more. */
  restart() {
    for (const picture of this.collection.pictures) {
      if (picture.status !== "failed") picture.status = "waiting";
    }
    this.#stop();
    this.wake();
  }

  /** Stop sending; what was not answered is held until `resume`. */
  cancel() {
    for (const picture of this.collection.with("waiting")) picture.status = "held";
    this.#stop();
    this.onChange();
  }

  /** Go on after `cancel`. */
  resume() {
    for (const picture of this.collection.with("held")) picture.status = "waiting";
    this.wake();
  }

  #stop() {
    this.running?.abort();
    this.running = null;
  }

  /** What goes into the next request. */
  #next() {
    const { limits, first } = this.settings();
    const waiting = this.collection.with("waiting");
    if (waiting.includes(first)) return [first];
    const chunk = [];
    let size = 0;
    for (const picture of waiting.slice(0, Math.min(limits.images, LARGEST_CHUNK))) {
      size += picture.blob.size + PER_PICTURE_BYTES;
      if (chunk.length && size > limits.body_bytes) break;
      chunk.push(picture);
    }
    return chunk;
  }

  async #send(chunk, signal) {
    const { budget, topK, limits } = this.settings();
    if (chunk.length === 1 && chunk[0].blob.size + PER_PICTURE_BYTES > limits.body_bytes) {
      const size = `${bytes(chunk[0].blob.size)} is more than the ${bytes(limits.body_bytes)}`;
      this.#fail(chunk[0], `${size} that this server takes`);
      return;
    }
    let answer;
    try {
      answer = await predict(chunk, { budget, topK, signal, onWait: this.onWait });
    } catch (error) {
      if (signal.aborted || !isAboutPictures(error, chunk)) throw error;
      await this.#without(chunk, error, signal);
      return;
    }
    signal.throwIfAborted();
    chunk.forEach((picture, i) => {
      picture.status = "done";
      picture.result = answer.results[i];
      picture.error = null;
    });
    this.done += chunk.length;
    this.onAnswer(answer);
  }

  /** Once more without the picture at fault; by halves where none is named. */
  async #without(chunk, error, signal) {
    const guilty = chunk.length === 1 ? chunk[0] : chunk[error.image];
    if (guilty) {
      this.#fail(guilty, error.message);
      const rest = chunk.filter((picture) => picture !== guilty);
      if (rest.length) await this.#send(rest, signal);
      return;
    }
    const half = Math.ceil(chunk.length / 2);
    await this.#send(chunk.slice(0, half), signal);
    await this.#send(chunk.slice(half), signal);
  }

  #fail(picture, message) {
    picture.status = "failed";
    picture.error = message;
    picture.result = null;
    this.done += 1;
    this.onChange();
  }
}

/** Whether other pictures may fare better, or these in a smaller chunk. */
function isAboutPictures(error, chunk) {
  if (!(error instanceof ApiError)) return false;
  const late = [408, 504].includes(error.status) && chunk.length > 1;
  const refused = [400, 413, 415].includes(error.status) || error.code === "cut_off";
  return error.image !== null || late || refused;
}
