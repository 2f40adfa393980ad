//! How many shards a worker should own.

/// The most shards one of `n_members` workers owns when all `n_shards` are spread evenly.
pub fn fair_share(n_shards: usize, n_members: usize) -> usize {
    n_shards.div_ceil(n_members.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_all_shards_and_differ_by_little() {
        let check = |n_shards, n_members, expected| {
            assert_eq!(
                fair_share(n_shards, n_members),
                expected,
                "{n_shards} shards, {n_members} workers"
            );
        };
        check(8, 1, 8);
        check(8, 2, 4);
        check(8, 3, 3);
        check(8, 8, 1);
        check(8, 20, 1);
        check(8, 0, 8);
        for n_shards in 1..=64 {
            for n_members in 1..=70 {
                assert!(fair_share(n_shards, n_members) * n_members >= n_shards);
            }
        }
    }
}
