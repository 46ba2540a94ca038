//! Where the hub listens, and what proves that one belongs to the job. Rank 0 makes it, and MPI
//! brings it to the others, as numbers.
//!
//! A rank shows its number first, to whoever listens there, and both numbers travel as they are. So
//! they keep out mistakes: another job that has the port now, a scanner, a host with the same
//! address. They do not keep out somebody who can listen in this network, or in the place of the
//! hub. Such a one can also read and change what MPI sends.

#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::node::segment::new_number;

/// Addresses of a host that are told.
const MOST: usize = 12;
/// Numbers of an invitation: both cookies, the port, and the addresses.
pub(crate) const WORDS: usize = 5 + 2 * MOST;

/// How to join.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Invitation {
    /// What a rank shows the hub, and what the hub shows the rank.
    pub(super) of_rank: u128,
    pub(super) of_hub: u128,
    pub(super) port: u16,
    pub(super) addresses: Vec<IpAddr>,
}

impl Invitation {
    pub(super) fn new(port: u16) -> Invitation {
        let random = || u128::from(new_number()) << 64 | u128::from(new_number());
        let mut addresses = own_addresses();
        addresses.truncate(MOST);
        Invitation {
            of_rank: random(),
            of_hub: random(),
            port,
            addresses,
        }
    }

    /// As numbers; the port of an invitation is not 0.
    pub(crate) fn words(&self) -> [u64; WORDS] {
        let addresses = self.addresses.iter().map(|address| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        });
        let halves = |number: u128| [(number >> 64) as u64, number as u64];
        let numbers = [self.of_rank, self.of_hub].into_iter().flat_map(halves);
        let mut all = numbers
            .chain([u64::from(self.port)])
            .chain(addresses.flat_map(halves));
        std::array::from_fn(|_| all.next().unwrap_or(0))
    }

    /// From those numbers; none if the hub could not listen.
    pub(crate) fn from_words(words: &[u64]) -> Option<Invitation> {
        let whole = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let &[a, b, c, d, port, ref addresses @ ..] = words else {
            return None;
        };
        let addresses = addresses.chunks_exact(2);
        let addresses = addresses.map(|halves| whole(halves[0], halves[1]));
        Some(Invitation {
            of_rank: whole(a, b),
            of_hub: whole(c, d),
            port: u16::try_from(port).ok().filter(|&port| port != 0)?,
            addresses: addresses
                .filter(|&bits| bits != 0)
                .map(|bits| Ipv6Addr::from_bits(bits).to_canonical())
                .collect(),
        })
    }

    /// Where to try, the most promising first.
    pub(super) fn places(&self) -> Vec<SocketAddr> {
        let own = own_addresses();
        let mut addresses = self.addresses.clone();
        addresses.sort_by_key(|&address| Reverse(promise(address, &own)));
        addresses
            .into_iter()
            .map(|address| SocketAddr::new(address, self.port))
            .collect()
    }
}

/// How likely a host with the addresses `own` reaches that one: by the bits that they share. An
/// address that this host has too, as bridges for containers have, is most likely its own.
fn promise(address: IpAddr, own: &[IpAddr]) -> u32 {
    let common = own.iter().map(|own| match (address, own) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    });
    if own.contains(&address) {
        return 0;
    }
    common.max().unwrap_or(0)
}

/// The addresses of this host that others may reach; that of the loopback if there are no others.
fn own_addresses() -> Vec<IpAddr> {
    let read = |name| fs::read_to_string(name).unwrap_or_default();
    let mut all = ipv4(&read("/proc/net/fib_trie"));
    all.extend(ipv6(&read("/proc/net/if_inet6")));
    if all.is_empty() {
        all.push(Ipv4Addr::LOCALHOST.into());
    }
    all
}

/// From the kernel's table of routes: a local address is followed by a line that says so.
fn ipv4(table: &str) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Vec::new();
    let mut last = None;
    for line in table.lines() {
        if let Some((_, address)) = line.split_once("|-- ") {
            last = address.trim().parse::<Ipv4Addr>().ok();
        } else if line.trim() == "/32 host LOCAL"
            && let Some(address) = last.filter(|address| !address.is_loopback())
            && !all.contains(&address.into())
        {
            all.push(address.into());
        }
    }
    all
}

/// From the kernel's table of addresses: hexadecimal digits, index, length, scope, flags, name.
fn ipv6(table: &str) -> Vec<IpAddr> {
    let global = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let bits = u128::from_str_radix(fields.first()?, 16).ok()?;
        (fields.get(3) == Some(&"00")).then(|| Ipv6Addr::from_bits(bits).into())
    });
    global.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_travels_as_numbers() {
        let invitation = Invitation {
            addresses: vec!["10.77.0.1".parse().unwrap(), "fd00::2".parse().unwrap()],
            ..Invitation::new(4711)
        };
        let words = invitation.words();
        assert_eq!(Invitation::from_words(&words), Some(invitation));
        assert_eq!(Invitation::from_words(&[0; WORDS]), None);
        assert_ne!(Invitation::new(1).of_rank, Invitation::new(1).of_rank);
    }

    #[test]
    fn addresses_are_read_from_the_kernels_tables() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n \
                     |-- 127.0.0.1\n /32 host LOCAL\n |-- 10.77.0.0\n /24 link UNICAST\n \
                     |-- 10.77.0.2\n /32 host LOCAL\nLocal:\n |-- 10.77.0.2\n /32 host LOCAL\n";
        assert_eq!(ipv4(table), ["10.77.0.2".parse::<IpAddr>().unwrap()]);
        let table = "fd000000000000000000000000000002 04 40 00 82     eth0\n\
                     00000000000000000000000000000001 01 80 10 80       lo\n\
                     fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n";
        assert_eq!(ipv6(table), ["fd00::2".parse::<IpAddr>().unwrap()]);
        assert!(!own_addresses().is_empty());
    }

    #[test]
    fn the_same_network_is_tried_first_and_own_addresses_last() {
        let own = ["172.17.0.1", "10.1.0.5"].map(|address| address.parse().unwrap());
        let of = |address: &str| promise(address.parse().unwrap(), &own);
        assert!(of("10.1.0.6") > of("10.2.0.6") && of("10.2.0.6") > of("192.0.2.1"));
        assert_eq!(of("172.17.0.1"), 0);
    }
}
