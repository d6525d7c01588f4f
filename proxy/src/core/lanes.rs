//! All lanes of a worker: two for each shard, which its clients share, and those that a client has
//! for itself (`tracking_own`).
//!
//! Invariant: a lane's number says where it is: those of shards count from 0, those of clients from
//! [`OWN_BIT`]. A lane that no client has any more is as new.

use std::ops::{Index, IndexMut};

use super::lane::{Lane, LaneNo};
use crate::routing::ShardNo;

/// Set in the number of a client's own lane. No number of a shard comes near it.
pub const OWN_BIT: LaneNo = 1 << 30;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    shared: Vec<Lane>,
    own: Vec<Lane>,
    free: Vec<LaneNo>,
}

impl Lanes {
    /// Lanes that are shared.
    pub(super) fn shared_len(&self) -> usize {
        self.shared.len()
    }

    pub(super) fn push_shared(&mut self, lane: Lane) {
        self.shared.push(lane);
    }

    /// One that is shared, if there is such a shard.
    pub(super) fn get(&self, no: usize) -> Option<&Lane> {
        self.shared.get(no)
    }

    /// Lanes that clients have.
    pub(super) fn own_len(&self) -> usize {
        self.own.len() - self.free.len()
    }

    /// Takes in a lane of a client, made with the number that it gets, and from one that is shared.
    pub(super) fn open_own(
        &mut self,
        shard: ShardNo,
        make: impl FnOnce(LaneNo, &Lane) -> Lane,
    ) -> LaneNo {
        let like = &self.shared[usize::from(shard) * 2];
        if let Some(no) = self.free.pop() {
            self.own[(no & !OWN_BIT) as usize] = make(no, like);
            return no;
        }
        let no = self.own.len() as LaneNo | OWN_BIT;
        let lane = make(no, like);
        self.own.push(lane);
        no
    }

    /// No client has this lane any more.
    pub(super) fn close_own(&mut self, no: LaneNo) {
        let fresh = self[no as usize].fresh();
        self[no as usize] = fresh;
        self.free.push(no);
    }

    /// The numbers of all lanes.
    pub(super) fn numbers(&self) -> impl Iterator<Item = LaneNo> + use<> {
        (0..self.shared.len() as LaneNo).chain(self.own_numbers())
    }

    pub(super) fn own_numbers(&self) -> impl Iterator<Item = LaneNo> + use<> {
        (0..self.own.len() as LaneNo).map(|at| at | OWN_BIT)
    }
}

impl<'a> IntoIterator for &'a mut Lanes {
    type Item = &'a mut Lane;
    type IntoIter = std::iter::Chain<std::slice::IterMut<'a, Lane>, std::slice::IterMut<'a, Lane>>;

    fn into_iter(self) -> Self::IntoIter {
        self.shared.iter_mut().chain(self.own.iter_mut())
    }
}

impl Index<usize> for Lanes {
    type Output = Lane;

    #[inline]
    fn index(&self, no: usize) -> &Lane {
        if no < OWN_BIT as usize {
            &self.shared[no]
        } else {
            &self.own[no - OWN_BIT as usize]
        }
    }
}

impl IndexMut<usize> for Lanes {
    #[inline]
    fn index_mut(&mut self, no: usize) -> &mut Lane {
        if no < OWN_BIT as usize {
            &mut self.shared[no]
        } else {
            &mut self.own[no - OWN_BIT as usize]
        }
    }
}
