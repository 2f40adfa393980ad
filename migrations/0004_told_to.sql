-- Up to where Redis was told of what a shard stored: the owner's word for all but its last batch, written with that one.
-- The next owner reads on from there.
alter table shard_state add column told_to bigint not null default 0;
update shard_state set told_to = applied_to;
