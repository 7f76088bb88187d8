// Frames of a camera, one when the last was dealt with.

import { reason } from "./messages";

/** Between two frames: a person reads no faster, and a phone stays cool. */
const PAUSE = 200;

export class Camera {
  private stream: MediaStream | undefined;

  constructor(private readonly video: HTMLVideoElement) {}

  get isOn(): boolean {
    return this.stream !== undefined;
  }

  /**
   * @throws Error if there is none, or it may not be used.
   */
  async start(): Promise<void> {
    if (!("mediaDevices" in navigator)) {
      throw new Error("browsers give cameras to https and localhost alone: open the page from there");
    }
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment" },
      });
    } catch (error) {
      throw new Error(refusal(error), { cause: error });
    }
    this.video.srcObject = this.stream;
    await this.video.play();
  }

  stop(): void {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = undefined;
    this.video.srcObject = null;
  }

  /**
   * Yield frames until `stop`; who takes one closes it.
   *
   * @throws Error if there are no more, though nobody stopped it.
   */
  async *frames(): AsyncGenerator<ImageBitmap> {
    for (const { stream } = this; stream !== undefined && stream === this.stream; ) {
      // The video would show the last one for ever.
      if (stream.getVideoTracks().some((track) => track.readyState === "ended" || track.muted)) {
        throw new Error("the camera gives no more pictures: see that it is connected and allowed");
      }
      let frame: ImageBitmap;
      try {
        frame = await createImageBitmap(this.video);
      } catch (error) {
        if (stream !== this.stream) return; // it was stopped meanwhile
        throw new Error(`the camera's picture cannot be read: ${reason(error)}`, { cause: error });
      }
      yield frame;
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }
}

function refusal(error: unknown): string {
  switch (error instanceof DOMException ? error.name : "") {
    case "NotAllowedError":
      return "the camera may not be used: allow it in the browser's settings of this page";
    case "NotFoundError":
      return "there is no camera on this device";
    default:
      return "the camera does not start: another program may be using it";
  }
}
