CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- Every start of a broker on this file. Claim tokens name the epoch and its nonce.
CREATE TABLE boot (
  epoch INTEGER PRIMARY KEY,
  nonce INTEGER NOT NULL,
  started_at INTEGER NOT NULL
) STRICT;

-- (application, namespace), interned.
CREATE TABLE pair (
  pair INTEGER PRIMARY KEY,
  application TEXT NOT NULL,
  namespace TEXT NOT NULL,
  UNIQUE (application, namespace)
) STRICT;

-- Topic partitions this broker has taken from: [start, next) is stored, finished or skipped;
-- below covered an acknowledged offset commit of this broker has passed. topic_id and owners: which
-- topic of that name it was, and who read it, as last committed; for the ledger.
CREATE TABLE source (
  source INTEGER PRIMARY KEY,
  topic TEXT NOT NULL,
  partition INTEGER NOT NULL,
  topic_id TEXT NOT NULL DEFAULT '',
  owners TEXT NOT NULL DEFAULT '',
  start INTEGER NOT NULL,
  next INTEGER NOT NULL,
  covered INTEGER NOT NULL,
  UNIQUE (topic, partition)
) STRICT;

CREATE TABLE activation (
  seq INTEGER PRIMARY KEY,
  status INTEGER NOT NULL CHECK (status BETWEEN 1 AND 4),
  pair INTEGER NOT NULL,
  -- pending: place in the order of hand-out, with seq. delayed: when it becomes pending.
  ready_at INTEGER NOT NULL CHECK (ready_at >= 0),
  -- pending or delayed: when time alone changes it. NULL: never.
  wake_at INTEGER CHECK (wake_at >= 0),
  -- 1: pending, and the index in memory may not hold it.
  spilled INTEGER NOT NULL DEFAULT 0,
  claim INTEGER NOT NULL DEFAULT 0 CHECK (claim >= 0),
  claim_epoch INTEGER NOT NULL DEFAULT 0,
  attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
  lost INTEGER NOT NULL DEFAULT 0 CHECK (lost >= 0),
  last_outcome INTEGER NOT NULL DEFAULT 0,
  given_back_at INTEGER,
  reason TEXT,
  error TEXT,
  source INTEGER NOT NULL,
  log_offset INTEGER NOT NULL,
  received_at INTEGER NOT NULL,
  expires_at INTEGER,
  deadline_ms INTEGER NOT NULL,
  -- The next two are the message's until a taskbroker v1 client reports others with a retry.
  max_attempts INTEGER NOT NULL,
  retry_delay_ms INTEGER NOT NULL,
  on_exceeded INTEGER NOT NULL,
  at_most_once INTEGER NOT NULL,
  id TEXT NOT NULL,
  taskname TEXT NOT NULL,
  -- What it asks for, hashed; 0: not known. Two with one id and different contents are in conflict.
  content INTEGER NOT NULL,
  -- CRC-32 over the immutable columns and the body.
  checksum INTEGER NOT NULL,
  size INTEGER NOT NULL,
  -- NULL: in payload.
  body BLOB
) STRICT;

CREATE TABLE payload (
  seq INTEGER PRIMARY KEY,
  body BLOB NOT NULL
) STRICT;

CREATE INDEX ready_order ON activation (pair, ready_at, seq) WHERE status = 1 AND spilled = 1;
CREATE INDEX wake_order ON activation (wake_at) WHERE wake_at IS NOT NULL;

-- What has left, for the de-duplication window: one blob of (id hash, claim and outcome) pairs
-- a tick, dropped by whole buckets.
CREATE TABLE finished (
  at INTEGER NOT NULL,
  entries BLOB NOT NULL
) STRICT;
CREATE INDEX finished_order ON finished (at);

-- Accepted and each end, counted in the transaction that moves the row.
CREATE TABLE books (
  pair INTEGER NOT NULL,
  term TEXT NOT NULL,
  count INTEGER NOT NULL,
  PRIMARY KEY (pair, term)
) STRICT, WITHOUT ROWID;

-- Dead letters that cannot leave through Kafka.
CREATE TABLE dead_letter (
  seq INTEGER PRIMARY KEY,
  at INTEGER NOT NULL,
  pair INTEGER NOT NULL,
  id TEXT NOT NULL,
  taskname TEXT NOT NULL,
  reason TEXT NOT NULL,
  story TEXT NOT NULL,
  body BLOB NOT NULL
) STRICT;
