//! A shard whose primary is lost and whose next one is not chosen yet.
//!
//! Invariant: nothing waits for an answer of the lost primary any more. Lanes settle what was in
//! flight (`lane/link.rs`); here every other connection to it is taken for lost, and so each of
//! their users does what it does then: a pop's outcome is unknown, a watch counts as touched, what
//! only waits is asked again at the next primary. Subscriptions go to the one that is about to be
//! promoted as soon as it is named, before anybody can publish there.

use std::net::SocketAddr;

use super::Core;
use super::hold::SETTLE_LIMIT_US;
use super::line::{Line, Use};
use super::subscriber::Feed;
use crate::routing::{RoutingTable, ShardNo, ShardRoute};

impl Core {
    /// Shards whose primary is lost according to a new table.
    pub(super) fn vacated_by(&self, table: &RoutingTable) -> Vec<ShardNo> {
        let pairs = self.table.shards.iter().zip(&table.shards).enumerate();
        let vacated = pairs.filter(|(_, pair)| match pair {
            (Some(old), Some(new)) => old.is_vacated_by(new),
            _ => false,
        });
        vacated.map(|(no, _)| no as ShardNo).collect()
    }

    /// Takes all connections to lost primaries for lost. The new table is in force.
    pub(super) fn vacate(&mut self, vacated: &[ShardNo]) {
        for &shard in vacated {
            let route = self.table.shards.get(usize::from(shard));
            let address = route.and_then(Option::as_ref).map(|route| route.address);
            if let Some(feed) = self.pubsub.feeds.get_mut(usize::from(shard)) {
                feed.vacant = address;
            }
        }
        // Questions may be at replicas; in a failover they may fail too. Monitors follow the route.
        let lost =
            |line: &Line| vacated.contains(&line.shard) && !matches!(line.user, Use::Monitor(_));
        let lines = self.lines.iter().filter(|(_, line)| lost(line));
        let lost: Vec<_> = lines.map(|(no, _)| no).collect();
        for no in lost {
            self.line_lost(no);
        }
        self.hurry_execs();
    }

    /// Transactions at primaries of older epochs must end soon.
    fn hurry_execs(&mut self) {
        let until_us = self.now_us + SETTLE_LIMIT_US;
        let is_old = |line: &Line| {
            let route = self.table.shards.get(usize::from(line.shard));
            let route = route.and_then(Option::as_ref);
            route.is_some_and(|route| route.epoch > line.epoch)
        };
        let execs = self.lines.iter().filter_map(|(_, line)| match line.user {
            Use::Exec { number } if is_old(line) => Some(number),
            _ => None,
        });
        let execs: Vec<u32> = execs.collect();
        for number in execs {
            self.hurry_exec(number, until_us);
        }
    }
}

impl Feed {
    /// Where the shard's messages are to be heard. `None`: nowhere yet.
    pub(super) fn address(&mut self, route: &ShardRoute) -> Option<SocketAddr> {
        if route.hold.is_none() || self.vacant != Some(route.address) {
            self.vacant = None;
            return Some(route.address);
        }
        route.target
    }
}
