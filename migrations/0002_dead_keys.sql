-- Writes that PostgreSQL refused for good. The write itself lies in the dead-letter stream; this row makes it a state of
-- its key: a lookup takes the newer of cache_entries and dead_keys.

create table dead_keys (
    key             text collate "C" not null,
    shard           smallint         not null,
    version         bigint           not null,
    -- where in the dead-letter stream the write lies
    dlq_seq         bigint           not null,
    -- why PostgreSQL refused it, the last time
    sqlstate        text             not null,
    reason          text             not null,
    -- how often storing it was tried
    attempts        integer          not null default 1,
    first_failed_at timestamptz      not null default clock_timestamp(),
    last_failed_at  timestamptz      not null default clock_timestamp(),
    -- null: parked, until a person replays or purges it
    next_try_at     timestamptz,
    constraint dead_keys_pkey primary key (key)
);

create index dead_keys_shard_next_try_at_idx on dead_keys (shard, next_try_at);
