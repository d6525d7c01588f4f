//! What lanes leave for others: orders for the worker, which owns the sockets, and news for the watch.

use std::net::SocketAddr;

use super::call::{Call, Ticket};
use super::hold::Level;
use super::lane::LaneNo;
use crate::routing::ShardNo;

/// What the worker must do with sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Connect, or take the connection that was prepared to the same address.
    Dial { lane: LaneNo, address: SocketAddr },
    /// Open a connection beforehand; say nothing on it.
    Prepare { lane: LaneNo, address: SocketAddr },
    /// Close the connection.
    Hangup { lane: LaneNo },
}

/// One finished hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldSample {
    pub shard: ShardNo,
    pub epoch: u64,
    pub longest_us: u64,
    pub requests: u64,
}

/// A primary stops, or begins, to answer a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    pub lane: LaneNo,
    pub shard: ShardNo,
    /// Of the connection.
    pub epoch: u64,
    /// `None`: it answers.
    pub since_us: Option<u64>,
}

/// What lanes leave for others.
#[derive(Debug, Default)]
pub struct Outbox {
    pub orders: Vec<Order>,
    pub levels: Vec<(ShardNo, Level)>,
    pub samples: Vec<HoldSample>,
    pub troubles: Vec<Trouble>,
    /// How many requests of a shard were answered by errors that are no client's fault.
    pub faults: Vec<(ShardNo, u64)>,
    /// Lanes with something to send.
    pub touched: Vec<LaneNo>,
    /// Lanes whose connection must be given up.
    pub abandoned: Vec<LaneNo>,
    /// Lanes of single clients whose node no longer knows what those have read.
    pub forgotten: Vec<LaneNo>,
    /// Questions to the rest of the process.
    pub calls: Vec<(Ticket, Call)>,
    /// Clients that are to go as soon as they are between two requests: slot and generation.
    pub partings: Vec<(u32, u32)>,
    /// Some lane has a deadline.
    pub unsteady: bool,
    /// A full queue has room again.
    pub freed: bool,
}

impl Outbox {
    /// Something is there for the watch.
    #[inline]
    pub fn has_notices(&self) -> bool {
        let is_quiet = self.levels.is_empty() && self.samples.is_empty();
        !(is_quiet && self.troubles.is_empty() && self.faults.is_empty())
    }

    /// A request of the shard was answered by an error that is not its client's fault.
    pub fn fault(&mut self, shard: ShardNo) {
        match self.faults.iter_mut().find(|(of, _)| *of == shard) {
            Some((_, count)) => *count += 1,
            None => self.faults.push((shard, 1)),
        }
    }
}
