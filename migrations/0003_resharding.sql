-- How many shards the nest is being given; null: none other than it has. From the moment when shards says the same, only
-- the streams have to follow.
alter table nest_state add column resharding_to smallint;
