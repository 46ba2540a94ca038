//! What the ranks of a node show of JAX's coordinator: who wants it, and where it is.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;

use crate::node::board::Board;
use crate::node::board::layout::Shown;

impl Board {
    /// Shows that a rank of this node wants the coordinator.
    pub(crate) fn want_coordinator(&self) {
        if self.sees(self.rank) {
            let own = &self.of(self.rank).wants_coordinator;
            own.store(1, Ordering::SeqCst);
        }
    }

    /// Whether a rank of this node wants it.
    pub(crate) fn is_coordinator_wanted(&self) -> bool {
        self.shown()
            .any(|shown| shown.wants_coordinator.load(Ordering::SeqCst) != 0)
    }

    /// Shows the ranks of this node where it is.
    pub(crate) fn show_coordinator(&self, place: SocketAddr) {
        if !self.sees(self.rank) {
            return;
        }
        let bits = match place.ip() {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
        // The port is written last, and is not 0.
        let words = [(bits >> 64) as u64, bits as u64, u64::from(place.port())];
        let own = &self.of(self.rank).coordinator;
        for (word, value) in own.iter().zip(words) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Where it is, once a rank of this node has shown that.
    pub(crate) fn coordinator(&self) -> Option<SocketAddr> {
        self.shown().find_map(|shown| {
            let port = shown.coordinator[2].load(Ordering::SeqCst) as u16;
            let [high, low] = [0, 1].map(|word| shown.coordinator[word].load(Ordering::SeqCst));
            let address = Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
            (port != 0).then(|| SocketAddr::new(address.to_canonical(), port))
        })
    }

    fn shown(&self) -> impl Iterator<Item = &Shown> {
        let segments = self.all.iter().flatten();
        segments.map(|segment| segment.atomics::<Shown>(0))
    }
}
