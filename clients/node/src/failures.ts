// What a server says of an error, and how long a client goes on in spite of it.

import { setTimeout as pause } from "node:timers/promises";

import { status, type ServiceError } from "@grpc/grpc-js";

import {
  BadRequest,
  ErrorInfo,
  type BadRequest_FieldViolation,
} from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

export interface Details {
  /** Stable name of the cause; "" if the server did not say this, but gRPC. */
  readonly reason: string;
  /** The fields at fault. */
  readonly fields: readonly BadRequest_FieldViolation[];
}

/** Whether an error came of a call, and not of a file, say. */
export function isStatus(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error;
}

/** Return the details that are sent beside a call's status. */
export function detailsOf(error: ServiceError): Details {
  const [sent] = error.metadata.get("grpc-status-details-bin");
  return details(sent instanceof Buffer ? Status.decode(sent) : undefined);
}

/** Return the details of a status, also of one that a task holds. */
export function details(said: Status | undefined): Details {
  let reason = "";
  const fields: BadRequest_FieldViolation[] = [];
  for (const { typeUrl, value } of said?.details ?? []) {
    if (typeUrl.endsWith("/google.rpc.ErrorInfo")) reason = ErrorInfo.decode(value).reason;
    if (typeUrl.endsWith("/google.rpc.BadRequest")) {
      fields.push(...BadRequest.decode(value).fieldViolations);
    }
  }
  return { reason, fields };
}

/** Whether a stream that ended so can be gone on with. */
function breaksOff(error: unknown): boolean {
  if (!isStatus(error)) return false;
  const { reason, fields } = detailsOf(error);
  switch (error.code) {
    case status.UNAVAILABLE:
      return true;
    case status.CANCELLED:
    case status.INTERNAL: // as gRPC calls a stream that was reset
      return reason === "";
    case status.FAILED_PRECONDITION:
      return fields.some(({ field }) => field === "spec.resume_from");
    default:
      return false;
  }
}

/** A stream is gone on with as long as the server is heard, and for this long after: a restart. */
const PATIENCE = 60_000;

export class Patience {
  private end = 0;
  private failures = 0;

  /** The server has something new. */
  heard(): void {
    this.end = Date.now() + PATIENCE;
    this.failures = 0;
  }

  /**
   * Pause after a stream ended with an error, each time longer.
   *
   * @throws The error, if it is not to be gone on with.
   */
  async after(error: unknown): Promise<void> {
    if (!breaksOff(error) || Date.now() > this.end) throw error;
    const longest = Math.min(100 * 3 ** this.failures, 5_000);
    this.failures += 1;
    // Clients that lost a server together must not come back together.
    await pause(longest * (0.6 + 0.4 * Math.random()));
  }
}
