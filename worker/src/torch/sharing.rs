//! Who writes which tensor, and which gradients travel together: pure functions of sizes and ranks.

/// Bytes of the bucket that is reduced first; small, so that the reduction starts early in the backward pass.
const FIRST_BUCKET_BYTES: u64 = 1 << 20;
/// Bytes of the others.
const BUCKET_BYTES: u64 = 25 << 20;

/// Shares tensors of `bytes` out over `ranks`: the largest first, each to the rank with the least so far. Answers the
/// rank of each tensor.
pub fn share_out(bytes: &[u64], ranks: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(bytes[index]), index));
    let mut loads: std::collections::BTreeSet<(u64, u32)> = (0..ranks.max(1)).map(|rank| (0, rank)).collect();
    let mut owners = vec![0; bytes.len()];
    for index in order {
        let (load, rank) = loads.pop_first().expect("at least one rank");
        owners[index] = rank;
        loads.insert((load + bytes[index], rank));
    }
    owners
}

/// Groups gradients into buckets, last parameter first, as the backward pass produces them. A function of the sizes
/// alone: the same after every restart.
pub fn buckets(bytes: &[u64]) -> Vec<Vec<usize>> {
    let mut buckets: Vec<Vec<usize>> = vec![Vec::new()];
    let mut filled = 0;
    for (index, size) in bytes.iter().enumerate().rev() {
        let limit = if buckets.len() == 1 { FIRST_BUCKET_BYTES } else { BUCKET_BYTES };
        if filled > 0 && filled + size > limit {
            buckets.push(Vec::new());
            filled = 0;
        }
        if let Some(bucket) = buckets.last_mut() {
            bucket.push(index);
        }
        filled += size;
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_shared_out_evenly_and_the_same_way_each_time() {
        let bytes = [5, 90, 10, 40, 50, 5];
        let owners = share_out(&bytes, 2);
        assert_eq!(owners, share_out(&bytes, 2));
        let load = |rank| bytes.iter().zip(&owners).filter(|(_, owner)| **owner == rank).map(|(size, _)| size).sum::<u64>();
        assert_eq!((load(0), load(1)), (100, 100));
        assert_eq!(share_out(&[1], 4), [0]);
        assert!(share_out(&[], 4).is_empty());
    }

    #[test]
    fn buckets_go_backwards_and_hold_each_parameter_once() {
        let mib = 1 << 20;
        assert_eq!(buckets(&[10, 20, 30]), [vec![2, 1, 0]]);
        assert_eq!(buckets(&[20 * mib, 20 * mib, 2 * mib, 512, 512]), [vec![4, 3], vec![2, 1], vec![0]]);
        assert_eq!(buckets(&[9 * mib]), [vec![0]]);
    }
}
