//! In which order samples come: a permutation of all windows for each epoch, or, of shards that come from elsewhere and are many, one of the
//! shards and then one of the windows of each block of them.
//!
//! A function of (seed, epoch, the listing) alone: neither of the number of ranks nor of how much a node can hold. Data of up to one block
//! comes in the same order wherever it is.

use std::collections::BTreeSet;

use super::random::{Permutation, Stream};

/// Bytes of shards that are shuffled together, where they come from elsewhere. Two such blocks are wanted at a time.
const BLOCK_BYTES: u64 = 256 * 1024 * 1024;

/// The order.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    windows: u64,
    shards: Vec<Shard>,
    /// Bytes of a block at least.
    block_bytes: u64,
    /// The epoch that was asked for last.
    epoch: Option<Epoch>,
    /// The block, of the epoch, that was turned to last.
    turned: Option<(u64, usize)>,
}

/// One shard.
#[derive(Debug, Clone, Copy)]
struct Shard {
    bytes: u64,
    /// Its first window, and how many are not held out.
    first: u64,
    windows: u64,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    blocks: Vec<Block>,
    /// The one that was asked for last, and the order of its windows.
    open: Option<(usize, Permutation)>,
}

#[derive(Debug)]
struct Block {
    /// Samples of the epoch before it.
    first: u64,
    windows: u64,
    /// Its shards, and how many of its windows are before each.
    shards: Vec<(u64, usize)>,
}

impl Order {
    /// All windows in one.
    pub fn whole(seed: u64, windows: u64) -> Self {
        Self { seed, windows, shards: Vec::new(), block_bytes: u64::MAX, epoch: None, turned: None }
    }

    /// `sizes`: bytes and windows of each shard; the last windows of all are held out, so that `windows` are left.
    pub fn of_shards(seed: u64, windows: u64, sizes: &[(u64, u64)]) -> Self {
        Self::in_blocks(seed, windows, sizes, BLOCK_BYTES)
    }

    fn in_blocks(seed: u64, windows: u64, sizes: &[(u64, u64)], block_bytes: u64) -> Self {
        let mut first = 0;
        let shard = |&(bytes, own): &(u64, u64)| {
            let shard = Shard { bytes, first, windows: windows.saturating_sub(first).min(own) };
            first += own;
            shard
        };
        let shards: Vec<Shard> = sizes.iter().map(shard).collect();
        let is_small = sizes.iter().map(|(bytes, _)| *bytes).sum::<u64>() <= block_bytes;
        let block_bytes = if is_small { u64::MAX } else { block_bytes };
        Self { seed, windows, shards, block_bytes, epoch: None, turned: None }
    }

    /// The window that sample `number` is.
    pub fn window(&mut self, number: u64) -> u64 {
        let (epoch, place) = (number / self.windows, number % self.windows);
        if self.epoch.as_ref().is_none_or(|own| own.number != epoch) {
            self.epoch = Some(Epoch { number: epoch, blocks: self.blocks(epoch), open: None });
        }
        let (seed, is_whole) = (self.seed, self.block_bytes == u64::MAX);
        let own = self.epoch.as_mut().expect("set above");
        let at = own.blocks.partition_point(|block| block.first <= place) - 1;
        let block = &own.blocks[at];
        let order = match own.open {
            Some((of, order)) if of == at => order,
            _ => {
                let stream = Stream::new(seed, "data").child(epoch);
                Permutation::new(if is_whole { stream } else { stream.child(at as u64) }, block.windows)
            }
        };
        own.open = Some((at, order));
        let within = order.at(place - block.first);
        if is_whole {
            return within;
        }
        let (before, shard) = block.shards[block.shards.partition_point(|(before, _)| *before <= within) - 1];
        self.shards[shard].first + within - before
    }

    fn blocks(&self, epoch: u64) -> Vec<Block> {
        let used: Vec<usize> = (0..self.shards.len()).filter(|index| self.shards[*index].windows > 0).collect();
        if self.block_bytes == u64::MAX {
            let shards = used.into_iter().map(|index| (self.shards[index].first, index)).collect();
            return vec![Block { first: 0, windows: self.windows, shards }];
        }
        let order = Permutation::new(Stream::new(self.seed, "shards").child(epoch), used.len() as u64);
        let (mut blocks, mut bytes): (Vec<Block>, u64) = (Vec::new(), u64::MAX);
        for place in 0..used.len() as u64 {
            let index = used[order.at(place) as usize];
            let shard = self.shards[index];
            if bytes >= self.block_bytes {
                let first = blocks.last().map_or(0, |block| block.first + block.windows);
                blocks.push(Block { first, windows: 0, shards: Vec::new() });
                bytes = 0;
            }
            let block = blocks.last_mut().expect("one was begun");
            block.shards.push((block.windows, index));
            block.windows += shard.windows;
            bytes += shard.bytes;
        }
        blocks
    }

    /// When sample `number` is of another block than the one before it: shards that are not needed now, and those that are, then those of
    /// the next block. To be asked after [`Self::window`].
    pub fn turned(&mut self, number: u64) -> Option<(Vec<usize>, Vec<usize>)> {
        let (epoch, place) = (number / self.windows, number % self.windows);
        let own = self.epoch.as_ref().filter(|own| own.number == epoch)?;
        let at = own.blocks.partition_point(|block| block.first <= place) - 1;
        let before = self.turned.replace((epoch, at));
        if before == Some((epoch, at)) {
            return None;
        }
        let shards = |block: &Block| block.shards.iter().map(|(_, index)| *index).collect::<Vec<_>>();
        let mut comes = shards(&own.blocks[at]);
        if before.is_some_and(|(of, _)| of != epoch) && own.blocks.len() == 1 {
            // It is all there already, as long as the node has room for it.
            return None;
        }
        match own.blocks.get(at + 1) {
            Some(next) => comes.extend(shards(next)),
            None if own.blocks.len() > 1 => comes.extend(self.blocks(epoch + 1).first().map(shards).unwrap_or_default()),
            None => {}
        }
        let needed: BTreeSet<usize> = comes.iter().copied().collect();
        let leaves = (0..self.shards.len()).filter(|index| !needed.contains(index)).collect();
        Some((leaves, comes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(block_bytes: u64, held_out: u64) -> Order {
        let sizes = [(30, 3), (50, 5), (0, 0), (20, 2), (10, 1), (40, 4)];
        Order::in_blocks(7, 15 - held_out, &sizes, block_bytes)
    }

    #[test]
    fn every_window_comes_once_in_an_epoch_whatever_the_blocks() {
        for (block_bytes, held_out) in [(1, 0), (40, 0), (60, 0), (1000, 0), (40, 5), (60, 1)] {
            let mut order = order(block_bytes, held_out);
            let windows = 15 - held_out;
            for epoch in 0..4 {
                let mut seen: Vec<u64> = (0..windows).map(|place| order.window(epoch * windows + place)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..windows).collect::<Vec<_>>(), "{block_bytes} {held_out}");
            }
        }
    }

    #[test]
    fn what_fits_in_a_block_comes_in_the_order_of_files() {
        let (mut whole, mut small) = (Order::whole(7, 15), order(150, 0));
        assert!((0..45).all(|number| whole.window(number) == small.window(number)));
        let mut blocks = order(60, 0);
        assert!((0..45).any(|number| whole.window(number) != blocks.window(number)));
    }

    #[test]
    fn a_block_reads_its_own_shards_and_the_next_is_asked_for_before_it_begins() {
        let mut order = order(60, 0);
        let shard_of =
            |window: u64| [(0, 3), (3, 8), (8, 8), (8, 10), (10, 11), (11, 15)].iter().position(|(a, b)| (*a..*b).contains(&window));
        let (mut asked, mut turns) = (Vec::new(), 0);
        for number in 0..60 {
            let window = order.window(number);
            if let Some((leaves, comes)) = order.turned(number) {
                turns += 1;
                assert!(leaves.iter().all(|index| !comes.contains(index)));
                asked = comes;
            }
            assert!(asked.contains(&shard_of(window).unwrap()), "sample {number}");
        }
        assert!(turns > 4, "{turns}");
        let mut other = Order::in_blocks(7, 15, &[(30, 3), (50, 5), (0, 0), (20, 2), (10, 1), (40, 4)], 60);
        let far = (45..60).map(|number| other.window(number)).collect::<Vec<_>>();
        assert_eq!(far, (45..60).map(|number| order.window(number)).collect::<Vec<_>>(), "a resume in the middle finds the same");
    }
}
