-- The projection of the log: the newest version of every key, and how far each shard has come.

create table cache_entries (
    -- compared byte by byte: the order in which batches lock rows and lists are read
    key          text collate "C" not null,
    -- base of the shard's stream + sequence of the message; see docs/adr/0002-versions.md
    version      bigint           not null,
    -- a tombstone: the row stays until nothing older can come any more
    deleted      boolean          not null,
    written_at   timestamptz      not null,
    -- null: lives until it is deleted. No index: one would end HOT updates; the janitor walks the primary key.
    expires_at   timestamptz,
    content_type text             not null,
    -- bytes, not jsonb: values come back as they were written, and "\u0000" is a legal one
    metadata     bytea            not null,
    value        bytea            not null,
    constraint cache_entries_pkey primary key (key)
) with (fillfactor = 80);

create table nest_state (
    -- there is one row
    only_row boolean  not null default true,
    -- how many shards the log has; recorded before the first of them is made
    shards   smallint not null,
    constraint nest_state_pkey primary key (only_row),
    constraint nest_state_only_row_check check (only_row)
);

create table shard_state (
    shard       smallint    not null,
    -- what the present stream of the shard adds to its sequences
    base        bigint      not null,
    -- every message up to this version is in cache_entries; set in the transaction that stores the rows
    applied_to  bigint      not null,
    -- Redis was not told of some batch: whoever reaches it next empties it and clears this
    redis_debt  boolean     not null default false,
    updated_at  timestamptz not null default clock_timestamp(),
    constraint shard_state_pkey primary key (shard),
    constraint shard_state_shard_check check (shard between 0 and 63)
) with (fillfactor = 50);
