//! Sizes as Kubernetes writes them.

/// Bytes of a size like `8Gi`, as the schema admits it: a whole number and a suffix. Saturates; what is no size is 0.
pub fn bytes(size: &str) -> u64 {
    let digits = size
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(size.len());
    let (number, suffix) = size.split_at(digits);
    let unit: u64 = match suffix {
        "" => 1,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => 0,
    };
    number.parse::<u64>().unwrap_or(0).saturating_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("8Gi"), 8 << 30);
        assert_eq!(bytes("500M"), 500_000_000);
        assert_eq!(bytes("1Ti"), 1 << 40);
        assert_eq!(bytes("1.5Gi"), 0);
        assert_eq!(bytes("much"), 0);
    }
}
