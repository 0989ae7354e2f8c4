// A picture from the camera, where there is one and its owner allows it.

import { byId } from "./dom.js";

/** Set the camera's window up; `take({name, blob})` gets every picture. */
export function watchCamera(take) {
  const dialog = byId("camera");
  const video = byId("camera-video");
  const message = byId("camera-message");
  const shoot = byId("camera-take");
  let stream = null;
  let taken = 0;

  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    video.srcObject = null;
  };
  byId("open-camera").addEventListener("click", async () => {
    message.textContent = "Waiting for the camera …";
    shoot.disabled = true;
    dialog.showModal();
    try {
      stream = await openCamera();
    } catch (error) {
      message.textContent = why(error);
      return;
    }
    if (!dialog.open) return stop(); // closed while the browser asked
    video.srcObject = stream;
    await video.play();
    message.textContent = "";
    shoot.disabled = false;
    shoot.focus();
  });
  shoot.addEventListener("click", async () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    taken += 1;
    dialog.close();
    take({ name: `camera ${taken}.jpg`, blob });
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
}

function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) throw new DOMException("", "NotSupportedError");
  const video = { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 720 } };
  return navigator.mediaDevices.getUserMedia({ video });
}

function why(error) {
  const reasons = {
    NotSupportedError:
      "The browser gives pages a camera only over https, or on this machine itself (localhost).",
    NotAllowedError:
      "The camera is not allowed for this page. The browser's address bar can change that.",
    NotFoundError: "No camera was found.",
    NotReadableError: "The camera is in use by another program.",
  };
  return reasons[error.name] ?? `The camera cannot be used (${error.name}).`;
}
