//! Promises not to promote, given to agents of primaries.
//!
//! Invariant: in memory only, so for [`TTL`] after its start an agent holds itself to promises that
//! it may have given before; and none is given for an epoch that is over.

use std::{collections::BTreeMap, time::Duration};

use slotmesh_proto::agent::v1::PromiseNotToPromoteRequest;

use super::{Boot, TTL};

/// Shards with a promise at once; a host has fewer nodes.
const PROMISES_MAX: usize = 4_096;

/// What has been promised, by instance and shard.
#[derive(Debug, Default)]
pub struct Promises {
    since: Boot,
    until: BTreeMap<(String, String), Boot>,
}

impl Promises {
    /// Of an agent that started then.
    pub fn since(started: Boot) -> Self {
        Self {
            since: started,
            until: BTreeMap::new(),
        }
    }

    /// Gives a promise, or says why not.
    pub fn give(
        &mut self,
        request: &PromiseNotToPromoteRequest,
        known_epoch: u64,
        now: Boot,
    ) -> Result<(), &'static str> {
        if request.epoch == 0 || request.epoch < known_epoch {
            return Err("a higher epoch is known here");
        }
        let ttl = Duration::from_millis(request.ttl_ms.into());
        if ttl > TTL {
            return Err("longer than promises are remembered");
        }
        self.until.retain(|_, until| *until > now);
        if self.until.len() >= PROMISES_MAX {
            return Err("too many promises");
        }
        let key = (request.instance_id.clone(), request.shard_id.clone());
        let until = self.until.entry(key).or_default();
        *until = now.plus(ttl).max(*until);
        Ok(())
    }

    /// For how long a promise for the shard lives, or may live.
    pub fn left(&self, instance_id: &str, shard_id: &str, now: Boot) -> Option<Duration> {
        let key = (instance_id.to_owned(), shard_id.to_owned());
        let forgotten = self.since.plus(TTL);
        let until = self.until.get(&key).copied().unwrap_or_default();
        let left = now.until(until.max(forgotten));
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(epoch: u64) -> PromiseNotToPromoteRequest {
        PromiseNotToPromoteRequest {
            instance_id: "r".into(),
            shard_id: "0".into(),
            epoch,
            ttl_ms: 3_000,
        }
    }

    #[test]
    fn a_promise_lives_for_its_time_and_is_not_given_for_an_epoch_that_is_over() {
        let mut promises = Promises::since(Boot(0));
        assert!(promises.give(&request(4), 5, Boot(9_000)).is_err());
        assert_eq!(promises.left("r", "0", Boot(9_000)), None);
        promises.give(&request(5), 5, Boot(9_000)).unwrap();
        let left = promises.left("r", "0", Boot(11_000));
        assert_eq!(left, Some(Duration::from_secs(1)));
        assert_eq!(promises.left("r", "1", Boot(11_000)), None);
        assert_eq!(promises.left("r", "0", Boot(12_000)), None);
    }

    #[test]
    fn an_agent_that_has_just_started_keeps_what_it_may_have_promised_before() {
        let promises = Promises::since(Boot(1_000));
        assert_eq!(
            promises.left("r", "0", Boot(1_500)),
            Some(Duration::from_millis(2_500))
        );
        assert_eq!(promises.left("r", "0", Boot(4_000)), None);
        let long = PromiseNotToPromoteRequest {
            ttl_ms: 3_001,
            ..request(1)
        };
        assert!(Promises::default().give(&long, 1, Boot(9_000)).is_err());
    }
}
