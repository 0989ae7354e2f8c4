// The server's HTTP interface: requests, patience, and errors in plain words.

const TRIES = 6; // of one request while the server says it is busy
const LONGEST_WAIT_S = 20;
const TOKEN = "dynaslim-token";

/** What the server, or the way to it, answered instead of a result. */
export class ApiError extends Error {
  /** `image` is the position of the picture at fault in the request, where one is. */
  constructor(status, code, message, image = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.image = image;
  }
}

/** The token for servers that ask for one; kept until the tab is closed. */
export const token = {
  get: () => {
    try {
      return sessionStorage.getItem(TOKEN) ?? token.kept;
    } catch {
      return token.kept;
    }
  },
  set: (value) => {
    token.kept = value;
    try {
      sessionStorage.setItem(TOKEN, value);
    } catch {
      // storage may be forbidden: the token then lasts as long as the page
    }
  },
  kept: null,
};

/** The models that are served. `onWait(seconds, message)` is told of every wait. */
export async function getModels({ signal, onWait } = {}) {
  return (await request("v1/models", { signal, onWait })).models;
}

/** The answer for pictures ({name, blob}), in their order; as trained where the budget is null. */
export function predict(pictures, { budget, topK, signal, onWait }) {
  const query = new URLSearchParams({ top_k: topK });
  if (budget !== null) query.set("budget", budget);
  const body = new FormData();
  for (const picture of pictures) body.append("images", picture.blob, picture.name);
  return request(`v1/predict?${query}`, { method: "POST", body, signal, onWait });
}

async function request(path, { method = "GET", body, signal, onWait }) {
  for (let tries = 1; ; tries += 1) {
    const headers = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
    let response;
    try {
      response = await fetch(path, { method, body, headers, signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw await unreachable(body);
    }
    if (response.ok) return response.json();
    const error = await readError(response);
    const busy = response.status === 429 || response.status === 503;
    if (!busy || tries === TRIES) throw error;
    const seconds = waitSeconds(response.headers.get("Retry-After"));
    onWait?.(seconds, error.message);
    await sleep(seconds, signal);
  }
}

/** A server that refuses an upload may hang up before it says so; one that is down never speaks. */
async function unreachable(body) {
  if (body) {
    const alive = await fetch("healthz").then((answer) => answer.ok, () => false);
    if (alive) return new ApiError(0, "cut_off", "the server broke the upload off: too large?");
  }
  return new ApiError(0, "unreachable", "the server does not answer");
}

async function readError(response) {
  let said = null;
  try {
    said = (await response.json()).error;
  } catch {
    // a proxy in between speaks HTML
  }
  const message = said?.message ?? `the server answered ${response.status} ${response.statusText}`;
  return new ApiError(response.status, said?.code ?? "", message, said?.image ?? null);
}

function waitSeconds(retryAfter) {
  const seconds = Number.parseFloat(retryAfter);
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0.2), LONGEST_WAIT_S) : 1;
}

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}
