//! Commands over several shards: MGET and its kin by key, others to every shard.
//!
//! A part is what one unit has of the keys: a shard, or a slot if the instance says so. Parts of one
//! shard follow each other on its lane.
//!
//! Invariant: all parts are taken, or none is. A part is an ordinary request of its lane, so later
//! commands of the client to that shard stay behind it, also when it is sent again.

use slotmesh_command::{Command, Gather};
use slotmesh_resp::write;
use slotmesh_topology::Slot;

use super::Core;
use super::dispatch::Flow;
use super::gather::{Merge, Owner};
use super::lane::lane_no;
use super::queue::{Entry, Kind};
use super::retry::Effect;
use super::spec::{self, Request};
use crate::routing::{NO_SHARD, ShardNo};

/// Which key goes where. One per worker; it means nothing between commands.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The units that have a key, in order of their first.
    units: Vec<u16>,
    /// The shard of each of `units`.
    shards: Vec<ShardNo>,
    /// Keys of each of `units`.
    counts: Vec<u32>,
    /// The part of each key.
    places: Vec<u16>,
    /// Number of a unit's part, by unit.
    part_of: Vec<u16>,
    /// Indices of the keys, sorted by part, in order inside a part.
    sorted: Vec<u32>,
    frame: Vec<u8>,
}

const NO_PART: u16 = u16::MAX;
/// A larger list served one huge command.
const RETAINED: usize = 64 * 1024;

impl Plan {
    fn clear(&mut self) {
        for unit in self.units.drain(..) {
            self.part_of[usize::from(unit)] = NO_PART;
        }
        self.shards.clear();
        self.counts.clear();
        self.places.clear();
        self.sorted.clear();
        self.frame.clear();
        self.places.shrink_to(RETAINED);
        self.sorted.shrink_to(RETAINED);
        self.frame.shrink_to(RETAINED);
    }

    fn add(&mut self, unit: u16, shard: ShardNo) {
        let at = usize::from(unit);
        if self.part_of.len() <= at {
            self.part_of.resize(at + 1, NO_PART);
        }
        if self.part_of[at] == NO_PART {
            self.part_of[at] = self.units.len() as u16;
            self.units.push(unit);
            self.shards.push(shard);
            self.counts.push(0);
        }
        let part = self.part_of[at];
        self.counts[usize::from(part)] += 1;
        self.places.push(part);
    }

    /// Counting sort: linear in the keys, however many shards there are.
    fn sort(&mut self) {
        let mut next: smallvec::SmallVec<[u32; 32]> = smallvec::SmallVec::new();
        let mut start = 0;
        for count in &self.counts {
            next.push(start);
            start += count;
        }
        self.sorted.resize(self.places.len(), 0);
        for (key, part) in self.places.iter().enumerate() {
            let at = &mut next[usize::from(*part)];
            self.sorted[*at as usize] = key as u32;
            *at += 1;
        }
    }
}

impl Core {
    /// A command whose keys are at every `step`th place from 1 on. Each shard gets its keys.
    /// An instance with one shard gets the command as it is.
    pub(super) fn split(
        &mut self,
        slot: u32,
        command: &'static Command,
        merge: slotmesh_command::Merge,
        request: Request<'_>,
    ) -> Flow {
        let effect = spec::effect(command);
        let (merge, step) = match merge {
            slotmesh_command::Merge::Mget => (Merge::Elements, 1),
            slotmesh_command::Merge::Mset => (Merge::First, 2),
            slotmesh_command::Merge::Sum => (Merge::Sum, 1),
        };
        self.split.clear();
        let by_slot =
            self.table.settings.parameters.split_by_slot && self.table.only_shard().is_none();
        for index in (1..request.len()).step_by(step) {
            let key = request.arg(index);
            let shard = self.table.shard_of(key);
            if shard == NO_SHARD {
                return self.forward(slot, shard, Kind::Single, effect, 0, request.frame);
            }
            let unit = if by_slot {
                Slot::of(key).number()
            } else {
                shard
            };
            self.split.add(unit, shard);
        }
        if let [shard] = self.split.shards[..] {
            return self.forward(slot, shard, Kind::Single, effect, 0, request.frame);
        }
        if !self.have_room(slot) {
            return Flow::NoRoom;
        }
        self.split.sort();
        let parts = self.split.shards.len() as u16;
        let Some((entry, owner)) = self.begin(slot, effect) else {
            return Flow::Taken;
        };
        let places = if merge == Merge::Elements {
            &self.split.places[..]
        } else {
            &[]
        };
        let number = self.gathers.open(owner, merge, parts, places);
        let mut from = 0;
        for part in 0..parts {
            let count = self.split.counts[usize::from(part)] as usize;
            let frame = &mut self.split.frame;
            frame.clear();
            write::write_array_header(frame, 1 + count * step);
            write::write_bulk(frame, request.arg(0));
            for key in &self.split.sorted[from..from + count] {
                for offset in 0..step {
                    write::write_bulk(frame, request.arg(1 + *key as usize * step + offset));
                }
            }
            from += count;
            let lane = lane_no(self.split.shards[usize::from(part)], owner.protocol);
            let entry = Entry {
                aux: number,
                part,
                ..entry
            };
            self.lanes[lane as usize].submit(entry, frame, self.now_us, &mut self.out);
        }
        Flow::Taken
    }

    /// The same command to every shard.
    pub(super) fn send_to_all(
        &mut self,
        slot: u32,
        command: &'static Command,
        gather: Gather,
        request: Request<'_>,
    ) -> Flow {
        let effect = spec::effect(command);
        let merge = match gather {
            Gather::Sum => Merge::Sum,
            Gather::Concat => Merge::Concat,
            Gather::AllOk => Merge::First,
            Gather::AnyOk => Merge::Any,
            Gather::EachMin => Merge::All,
        };
        self.split.clear();
        for shard in self.table.all_shards() {
            self.split.add(shard, shard);
        }
        match self.split.shards[..] {
            [] => return self.forward(slot, NO_SHARD, Kind::Single, effect, 0, &[]),
            [shard] => {
                return self.forward(slot, shard, Kind::Single, effect, 0, request.frame);
            }
            _ => {}
        }
        if !self.have_room(slot) {
            return Flow::NoRoom;
        }
        let parts = self.split.shards.len() as u16;
        let Some((entry, owner)) = self.begin(slot, effect) else {
            return Flow::Taken;
        };
        let number = self.gathers.open(owner, merge, parts, &[]);
        for part in 0..parts {
            let lane = lane_no(self.split.shards[usize::from(part)], owner.protocol);
            let entry = Entry {
                aux: number,
                part,
                ..entry
            };
            self.lanes[lane as usize].submit(entry, request.frame, self.now_us, &mut self.out);
        }
        Flow::Taken
    }

    /// True if every lane of the plan can take its part.
    fn have_room(&mut self, slot: u32) -> bool {
        let Some(client) = self.sessions.get(slot) else {
            return true;
        };
        let protocol = client.state.protocol;
        for shard in &self.split.shards {
            let lane = &mut self.lanes[lane_no(*shard, protocol) as usize];
            if !lane.has_room(self.table.settings.hold_bytes_max) {
                lane.note_full(self.now_us, &mut self.out);
                return false;
            }
        }
        true
    }

    fn begin(&mut self, slot: u32, effect: Effect) -> Option<(Entry, Owner)> {
        let client = self.sessions.get_mut(slot)?;
        let (generation, seq) = client.ticket();
        let protocol = client.state.protocol;
        let entry = Entry {
            client: slot,
            generation,
            seq,
            db: client.state.db,
            effect,
            ..Entry::own(Kind::Part)
        };
        Some((
            entry,
            Owner {
                client: slot,
                generation,
                seq,
                protocol,
            },
        ))
    }
}
