//! How many connections there may be: in all, without a certificate of ours, and from one address.
//!
//! Agents, which show a certificate of our CA, are counted in all only: however many others hold connections open, there is room for them. An
//! address stands for what one customer of a provider has: of IPv6 that is a /64. The trap: a counter that an early return forgets would close
//! the doors for good, so a place is given back by dropping it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use everlit_api::server::Peer;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections at once in all.
pub const CONNECTIONS_MAX: usize = 4_096;
/// Of these kept for agents of other machines.
pub const FOR_AGENTS: usize = 1_024;
/// From one address, agents not counted.
pub const OF_ONE_MAX: usize = 1_024;
/// Open files for everything else.
const OTHER_FILES: usize = 256;

const _: () = assert!(OF_ONE_MAX < CONNECTIONS_MAX - FOR_AGENTS, "one address does not fill it alone");

/// Counts by address, each up to a bound.
#[derive(Debug, Clone)]
pub struct PerAddress {
    max: usize,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One that is counted for its address while it lives.
#[derive(Debug)]
pub struct Counted {
    all: PerAddress,
    address: IpAddr,
}

/// A connection's place.
#[derive(Debug)]
pub struct Place {
    _any: OwnedSemaphorePermit,
    _other: Option<(OwnedSemaphorePermit, Counted)>,
}

/// Places for connections.
#[derive(Debug, Clone)]
pub struct Places {
    any: Arc<Semaphore>,
    others: Arc<Semaphore>,
    of_one: PerAddress,
}

impl PerAddress {
    /// At most so many of one address.
    pub fn new(max: usize) -> Self {
        Self { max, counts: Arc::default() }
    }

    /// One more of this address; `None` when it has its share.
    pub fn enter(&self, from: IpAddr) -> Option<Counted> {
        let address = whose(from);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Counted { all: self.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.all.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

impl Places {
    /// As many as there may be, or as this process may have open.
    pub fn new() -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX));
        let any = CONNECTIONS_MAX.min(files.saturating_sub(OTHER_FILES)).max(2);
        Self::of(any, FOR_AGENTS.min(any / 2), OF_ONE_MAX)
    }

    fn of(any: usize, for_agents: usize, of_one: usize) -> Self {
        let others = any - for_agents;
        Self { any: Arc::new(Semaphore::new(any)), others: Arc::new(Semaphore::new(others)), of_one: PerAddress::new(of_one) }
    }

    /// A place for a connection; why there is none, for people.
    pub fn enter(&self, peer: &Peer) -> Result<Place, &'static str> {
        let other = match peer.certificate {
            Some(_) => None,
            None => {
                let own = self.of_one.enter(peer.address.ip()).ok_or("its address has as many connections as one may have")?;
                let other = self.others.clone().try_acquire_owned().map_err(|_| "there are as many connections as there may be")?;
                Some((other, own))
            }
        };
        let any = self.any.clone().try_acquire_owned().map_err(|_| "there are as many connections as there may be")?;
        Ok(Place { _any: any, _other: other })
    }
}

impl Default for Places {
    fn default() -> Self {
        Self::new()
    }
}

/// The address that stands for all that its owner has.
fn whose(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(own) => IpAddr::V6(Ipv6Addr::from_bits(own.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str, agent: bool) -> Peer {
        Peer { address: (address.parse::<IpAddr>().expect("an address"), 1).into(), certificate: agent.then_some([1; 32]) }
    }

    #[test]
    fn no_address_and_no_crowd_takes_the_places_of_agents() {
        let places = Places::of(6, 2, 3);
        let one: Vec<_> = (0..3).map(|_| places.enter(&peer("10.0.0.1", false)).expect("room")).collect();
        assert_eq!(places.enter(&peer("10.0.0.1", false)).err(), Some("its address has as many connections as one may have"));
        assert!(places.enter(&peer("::ffff:10.0.0.1", false)).is_err(), "the same one");
        let other = places.enter(&peer("10.0.0.2", false)).expect("room");
        assert_eq!(places.enter(&peer("10.0.0.3", false)).err(), Some("there are as many connections as there may be"));
        let agents: Vec<_> = (0..2).map(|_| places.enter(&peer("10.0.0.1", true)).expect("kept for it")).collect();
        assert!(places.enter(&peer("10.0.0.9", true)).is_err(), "in all there is an end");
        // Everything is given back, and what was refused holds nothing.
        drop((one, other, agents));
        let again: Vec<_> = (1..=4).map(|n| places.enter(&peer(&format!("10.0.0.{n}"), false)).expect("room")).collect();
        assert_eq!(places.of_one.counts.lock().expect("no panic").len(), 4);
        drop(again);
        assert!(places.of_one.counts.lock().expect("no panic").is_empty());
    }

    #[test]
    fn what_one_customer_has_counts_as_one_address() {
        let all = PerAddress::new(1);
        let _one = all.enter("2001:db8:1:2::1".parse().expect("an address")).expect("room");
        assert!(all.enter("2001:db8:1:2:ffff::9".parse().expect("an address")).is_none());
        assert!(all.enter("2001:db8:1:3::1".parse().expect("an address")).is_some());
    }
}
