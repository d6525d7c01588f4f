//! What a client on its way monitors and tracks.
//!
//! Monitors travel as listeners do ([`super::passing_topics`]): the marker that is published is a line
//! of MONITOR too, so each line is shown by one process. A client that tracks keeps its options, and
//! whoever takes it tells it once to forget everything. Invariants: of what it has read nothing can change
//! between two processes unnoticed; and a client that others redirect to never leaves before them.

use slotmesh_proto::handover::v1 as pb;

use super::Core;
use super::client::{NAME_BYTES, StateError};
use super::monitor::Source;
use super::tracking_options::{Mode, Options};

/// A node that is monitored, as another process knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseSource {
    pub shard_id: String,
    /// Its replica of this number; `None`: its primary.
    pub replica: Option<u16>,
}

/// CLIENT TRACKING.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseTracking {
    pub(super) options: Options,
    pub(super) caching: bool,
    pub(super) broken: bool,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looks {
    pub(super) sources: Vec<LooseSource>,
    pub(super) tracking: Option<LooseTracking>,
}

impl LooseSource {
    pub(crate) fn to_message(&self) -> pb::Source {
        pb::Source {
            shard_id: self.shard_id.clone(),
            replica: self.replica.map(u32::from),
        }
    }

    /// `None`: it has no number that can be.
    pub(crate) fn read(source: pb::Source) -> Option<Self> {
        let replica = source.replica.map(u16::try_from).transpose().ok()?;
        Some(Self {
            shard_id: source.shard_id,
            replica,
        })
    }
}

impl Looks {
    pub(super) fn bytes_len(&self) -> usize {
        let sources = self.sources.iter().map(|s| NAME_BYTES + s.shard_id.len());
        let tracking = self.tracking.iter().flat_map(|t| &t.options.prefixes);
        let prefixes = tracking.map(|prefix| NAME_BYTES + prefix.len());
        sources.sum::<usize>() + prefixes.sum::<usize>()
    }

    pub(super) fn sources(&self) -> Vec<pb::Source> {
        self.sources.iter().map(LooseSource::to_message).collect()
    }

    pub(super) fn tracking(&self) -> Option<pb::Tracking> {
        use pb::tracking::Mode as Told;
        let own = self.tracking.as_ref()?;
        let mode = match own.options.mode {
            Mode::All => Told::All,
            Mode::OptIn => Told::OptIn,
            Mode::OptOut => Told::OptOut,
            Mode::Broadcast => Told::Broadcast,
        };
        Some(pb::Tracking {
            mode: mode.into(),
            redirect: own.options.redirect,
            no_loop: own.options.no_loop,
            prefixes: own.options.prefixes.iter().cloned().collect(),
            caching: own.caching,
            broken: own.broken,
        })
    }

    pub(super) fn read(
        sources: Vec<pb::Source>,
        tracking: Option<pb::Tracking>,
    ) -> Result<Option<Box<Self>>, StateError> {
        use pb::tracking::Mode as Told;
        let sources: Option<Vec<_>> = sources.into_iter().map(LooseSource::read).collect();
        let read = |own: pb::Tracking| {
            let mode = match Told::try_from(own.mode) {
                Ok(Told::All) => Mode::All,
                Ok(Told::OptIn) => Mode::OptIn,
                Ok(Told::OptOut) => Mode::OptOut,
                Ok(Told::Broadcast) => Mode::Broadcast,
                Err(_) => return Err(StateError::Field("mode of tracking")),
            };
            Ok(LooseTracking {
                options: Options {
                    mode,
                    redirect: own.redirect,
                    no_loop: own.no_loop,
                    prefixes: own.prefixes.into_iter().collect(),
                },
                caching: own.caching,
                broken: own.broken,
            })
        };
        let looks = Self {
            sources: sources.ok_or(StateError::Field("replica"))?,
            tracking: tracking.map(read).transpose()?,
        };
        Ok((looks != Self::default()).then(|| Box::new(looks)))
    }

    #[cfg(test)]
    pub(super) fn example() -> Self {
        Self {
            sources: vec![LooseSource {
                shard_id: "s1".to_owned(),
                replica: Some(2),
            }],
            tracking: Some(LooseTracking {
                options: Options {
                    mode: Mode::Broadcast,
                    redirect: 7,
                    no_loop: true,
                    prefixes: [b"a".to_vec(), vec![0xff]].into(),
                },
                caching: true,
                broken: true,
            }),
        }
    }
}

impl Core {
    /// What a client monitors, as another process knows it. What is gone meanwhile is left out.
    pub(super) fn loose_sources(&self, slot: u32) -> Vec<LooseSource> {
        let route = |source: &Source| self.table.shards.get(usize::from(source.shard))?.as_ref();
        let sources = self.sources_shown_to(slot).iter();
        let loose = sources.filter_map(|source| {
            Some(LooseSource {
                shard_id: route(source)?.shard_id.clone(),
                replica: source.replica,
            })
        });
        loose.collect()
    }

    pub(super) fn looks_of(&self, slot: u32) -> Option<Box<Looks>> {
        let extra = self.sessions.get(slot)?.extra.as_ref()?;
        let tracking = extra.tracking.as_ref().map(|own| LooseTracking {
            options: own.options.clone(),
            caching: own.caching,
            broken: own.broken,
        });
        let looks = Looks {
            sources: self.loose_sources(slot),
            tracking,
        };
        (looks != Looks::default()).then(|| Box::new(looks))
    }

    /// A client monitors what it has monitored at another process.
    pub(super) fn restore_sources(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let Some(looks) = &mut client.state.looks else {
            return;
        };
        let sources = std::mem::take(&mut looks.sources);
        let known = sources.into_iter().filter_map(|source| {
            Some(Source {
                shard: self.table.number_of(&source.shard_id)?,
                replica: source.replica,
            })
        });
        let known: Vec<Source> = known.collect();
        if !known.is_empty() {
            self.watch_sources(slot, known, None);
        }
    }

    /// A client tracks as it has tracked at another process. What it has read may have changed while
    /// nobody looked.
    pub(super) fn restore_tracking(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let generation = client.generation;
        let looks = client.state.looks.take();
        let Some(tracking) = looks.and_then(|looks| looks.tracking) else {
            return;
        };
        self.set_tracking(slot, tracking.options, None);
        let client = self.sessions.get_mut(slot);
        let extra = client.and_then(|client| client.extra.as_mut());
        let Some(own) = extra.and_then(|extra| extra.tracking.as_mut()) else {
            return;
        };
        (own.caching, own.broken) = (tracking.caching, tracking.broken);
        let lane = own.own.as_ref().map(|own| own.lane);
        match lane.and_then(|lane| self.lanes[lane as usize].own.as_mut()) {
            // It is told as soon as the node tracks, as when the node has forgotten what it read.
            Some(own) => own.tracked = true,
            None => self.tell((slot, generation), None),
        }
    }
}
