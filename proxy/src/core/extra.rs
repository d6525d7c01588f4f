//! What few clients have: state that makes each of their commands take the long way.
//!
//! Invariant: a client without any of it has none at all, so that most clients pay one look at an
//! empty pointer. Who ends the last state of a client calls [`Client::tidy_extra`].

use std::sync::Arc;

use slotmesh_acl::User;

use super::client::Client;
use super::lane::{LaneNo, lane_no};
use super::monitor::Monitoring;
use super::pubsub_topics::Subscriber;
use super::tracking::Tracking;
use super::watching::Watching;
use crate::routing::ShardNo;

/// See the module. One field for each kind of state, `None` without it.
#[derive(Debug, Default)]
pub struct Extra {
    /// What it listens to.
    pub(super) subscriber: Option<Box<Subscriber>>,
    /// MONITOR.
    pub(super) monitoring: Option<Box<Monitoring>>,
    /// CLIENT TRACKING.
    pub(super) tracking: Option<Box<Tracking>>,
    /// CLIENT REPLY SKIP: the next command's reply goes nowhere.
    pub(super) skips_reply: bool,
    /// The account of a client that may not do everything.
    pub(super) account: Option<Arc<User>>,
    /// The account's rules as its scripts carry them.
    pub(super) rules_in_lua: Option<Arc<str>>,
    /// A command of it waits: its number.
    pub(super) wait: Option<u32>,
    /// WATCH.
    pub(super) watching: Option<Watching>,
}

impl Extra {
    fn is_empty(&self) -> bool {
        self.subscriber.is_none()
            && self.monitoring.is_none()
            && self.tracking.is_none()
            && !self.skips_reply
            && self.account.is_none()
            && self.wait.is_none()
            && self.watching.is_none()
    }
}

impl Client {
    /// The state, for writing.
    pub(super) fn extra_mut(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// Forgets the state if nothing is left of it.
    pub(super) fn tidy_extra(&mut self) {
        if self.extra.as_ref().is_some_and(|extra| extra.is_empty()) {
            self.extra = None;
        }
    }

    /// True if its commands need no second look.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.state.authenticated && self.state.transaction.is_none() && self.extra.is_none()
    }
}

/// What CLIENT LIST shows of it.
impl Client {
    pub(super) fn is_subscriber(&self) -> bool {
        self.subscriptions() != (0, 0, 0)
    }

    /// Channels, patterns and shard channels.
    pub(super) fn subscriptions(&self) -> (usize, usize, usize) {
        let extra = self.extra.as_ref();
        let Some(subscriber) = extra.and_then(|extra| extra.subscriber.as_ref()) else {
            return (0, 0, 0);
        };
        let [channels, patterns, shard_channels] = &subscriber.names;
        (channels.len(), patterns.len(), shard_channels.len())
    }

    /// True if the account may have every subscription of the client.
    pub(super) fn may_keep_subscriptions(&self, user: &User) -> bool {
        let extra = self.extra.as_ref();
        let Some(subscriber) = extra.and_then(|extra| extra.subscriber.as_ref()) else {
            return true;
        };
        let [channels, patterns, shard_channels] = &subscriber.names;
        let mut exact = channels.iter().chain(shard_channels);
        exact.all(|name| user.may_subscribe(name))
            && patterns.iter().all(|name| user.may_psubscribe(name))
    }

    pub(super) fn is_monitoring(&self) -> bool {
        self.extra
            .as_ref()
            .is_some_and(|extra| extra.monitoring.is_some())
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.extra
            .as_ref()
            .is_some_and(|extra| extra.tracking.is_some())
    }

    /// The lane that its commands for a shard take; and what [`super::queue::Entry`] has as `part`.
    #[inline]
    pub(super) fn lane(&self, shard: ShardNo) -> (LaneNo, u16) {
        let extra = self.extra.as_ref();
        let own = extra.and_then(|extra| extra.tracking.as_ref()?.own_lane());
        own.unwrap_or_else(|| (lane_no(shard, self.state.protocol), 0))
    }

    /// Id of the client that gets its invalidations; 0: itself; -1: it tracks nothing.
    pub(super) fn redirection(&self) -> i64 {
        let extra = self.extra.as_ref();
        let own = extra.and_then(|extra| extra.tracking.as_ref());
        own.map_or(-1, |own| own.options.redirect as i64)
    }
}
