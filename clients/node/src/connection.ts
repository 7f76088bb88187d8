// How a server is reached: TLS, tokens, retries, limits.

import { readFileSync } from "node:fs";

import {
  InterceptingCall,
  Metadata,
  credentials,
  type CallOptions,
  type ClientOptions,
  type Interceptor,
  type ServiceError,
} from "@grpc/grpc-js";

import { LearnerServiceClient } from "./gen/inflora/v1/learner_service.js";
import { PredictorServiceClient } from "./gen/inflora/v1/predictor_service.js";

/** What a server takes in one message, unless it is set to another size: 32 MiB. */
const MOST_BYTES = 32 * 1024 * 1024;

/** Of calls that answer at once. */
const DEADLINE = 60_000;

export interface Access {
  /** `host:port`. */
  readonly server: string;
  readonly tls?: boolean | undefined;
  /** PEM files. Each of them asks for TLS. */
  readonly ca?: string | undefined;
  readonly cert?: string | undefined;
  readonly key?: string | undefined;
  /** A file that holds a token. */
  readonly tokenFile?: string | undefined;
}

/** One server's services. */
export interface Connection {
  readonly learner: LearnerServiceClient;
  readonly predictor: PredictorServiceClient;
  /**
   * The same learner for streams: a call that may be retried is kept in memory, and takes what is
   * written as fast as a disk gives it, however slow the line is.
   */
  readonly streams: LearnerServiceClient;
  close(): void;
}

/**
 * Make clients; nothing is sent yet.
 *
 * @throws Error if a file cannot be read, or a token would be sent in the clear.
 */
export function connect(access: Access): Connection {
  const { server, ca, cert, key, tokenFile } = access;
  if ((cert === undefined) !== (key === undefined)) {
    throw new Error("--cert and --key belong together");
  }
  const encrypted = access.tls === true || ca !== undefined || cert !== undefined;
  const local = /^(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/.test(server);
  if (tokenFile !== undefined && !encrypted && !local) {
    throw new Error(`the token would be sent in the clear to ${server}: use TLS (--ca, or --tls)`);
  }
  const read = (file: string | undefined) => (file === undefined ? null : readFileSync(file));
  const channel = encrypted
    ? credentials.createSsl(read(ca), read(key), read(cert))
    : credentials.createInsecure();
  const options: ClientOptions = {
    "grpc.service_config": JSON.stringify(RETRIES),
    // A call that is larger is not retried: by default 1 MiB, less than some photos.
    "grpc.per_rpc_retry_buffer_size": MOST_BYTES,
    "grpc.retry_buffer_size": MOST_BYTES,
    "grpc.max_send_message_length": MOST_BYTES,
    "grpc.max_receive_message_length": MOST_BYTES,
    // By default, a connection that failed is left alone for a second: most retries would be lost.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 5_000,
    // A watch may be silent for long, and servers hang up on those who ping more often.
    "grpc.keepalive_time_ms": 320_000,
    "grpc.keepalive_timeout_ms": 20_000,
    // What is for this machine stays on it, whatever proxy the environment names.
    "grpc.enable_http_proxy": local && !encrypted ? 0 : 1,
    interceptors: tokenFile === undefined ? [] : [bearer(readFileSync(tokenFile, "utf8").trim())],
  };
  const learner = new LearnerServiceClient(server, channel, options);
  const predictor = new PredictorServiceClient(server, channel, options);
  const once = { ...options, "grpc.enable_retries": 0 };
  const streams = new LearnerServiceClient(server, channel, once);
  return {
    learner,
    predictor,
    streams,
    close: () => [learner, predictor, streams].forEach((client) => client.close()),
  };
}

/** Of calls that can be repeated: a server that stops refuses them, or resets those that wait. */
const RETRIES = {
  methodConfig: [
    {
      name: [
        { service: "inflora.v1.PredictorService", method: "Predict" },
        { service: "inflora.v1.LearnerService", method: "QueryUpload" },
        { service: "inflora.v1.LearnerService", method: "GetTask" },
      ],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.1s",
        maxBackoff: "5s",
        backoffMultiplier: 3,
        retryableStatusCodes: ["UNAVAILABLE", "CANCELLED"],
      },
    },
  ],
};

function bearer(token: string): Interceptor {
  if (!/^[\x21-\x7e]+$/.test(token)) {
    throw new Error("--token-file: a token is printable ASCII without blanks");
  }
  return (options, next) =>
    new InterceptingCall(next(options), {
      start(metadata, listener, start) {
        metadata.set("authorization", `Bearer ${token}`);
        start(metadata, listener);
      },
    });
}

type Done<Response> = (error: ServiceError | null, response: Response) => void;

/**
 * Make a call that answers once, with a deadline.
 *
 * @throws ServiceError if it does not answer.
 */
export function answered<Response>(
  call: (metadata: Metadata, options: CallOptions, done: Done<Response>) => unknown,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    call(new Metadata(), { deadline: Date.now() + DEADLINE }, (error, response) => {
      if (error === null) resolve(response);
      else reject(error);
    });
  });
}
