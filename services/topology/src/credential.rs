//! Credentials of an epoch: the fencing tokens.
//!
//! Redis knows no epoch, but it knows users: proxies log in as `px-<epoch>`, replicas as
//! `rp-<epoch>-<node>`. A process that lacks the users of an epoch cannot take part in it.
//! Passwords are derived (HMAC-SHA256) from the instance's secret, so no store of them exists.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::id::{Epoch, NodeId, ShardId};

/// The number is not an epoch: another one would be a user with another password.
const OBSERVER_USER: &str = "ob-1";

/// A user and its password.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credential {
    /// Name at the Redis process.
    pub user: String,
    /// Hexadecimal, 64 characters.
    pub password: String,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// As which proxies log in at the primary of `epoch`.
#[must_use]
pub fn proxy(secret: &[u8], shard: &ShardId, epoch: Epoch) -> Credential {
    let user = format!("px-{epoch}");
    Credential {
        password: derive(secret, shard, &user),
        user,
    }
}

/// As which `node` logs in, as a replica, at the primary of `epoch`.
#[must_use]
pub fn replica(secret: &[u8], shard: &ShardId, epoch: Epoch, node: &NodeId) -> Credential {
    let user = replica_name(epoch, node);
    Credential {
        password: derive(secret, shard, &user),
        user,
    }
}

/// The name of that user.
#[must_use]
pub fn replica_name(epoch: Epoch, node: &NodeId) -> String {
    format!("rp-{epoch}-{node}")
}

/// As which proxies log in at any node of the shard, at any epoch, to receive messages, to monitor
/// and to ask for INFO. It is outside the epochs because its rights need no fence.
#[must_use]
pub fn observer(secret: &[u8], shard: &ShardId) -> Credential {
    let user = OBSERVER_USER.to_owned();
    Credential {
        password: derive(secret, shard, &user),
        user,
    }
}

fn derive(secret: &[u8], shard: &ShardId, user: &str) -> String {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else {
        unreachable!("HMAC takes a key of any length")
    };
    mac.update(b"slotmesh/v1/");
    mac.update(shard.as_str().as_bytes());
    mac.update(b"/");
    mac.update(user.as_bytes());
    hex::encode(mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differs_by_shard_epoch_kind_and_node_and_repeats() {
        let secret = [7; 32];
        let all = [
            proxy(&secret, &"0".into(), Epoch(1)),
            proxy(&secret, &"0".into(), Epoch(2)),
            proxy(&secret, &"1".into(), Epoch(1)),
            proxy(&[8; 32], &"0".into(), Epoch(1)),
            replica(&secret, &"0".into(), Epoch(1), &"a".into()),
            replica(&secret, &"0".into(), Epoch(1), &"b".into()),
            observer(&secret, &"0".into()),
            observer(&secret, &"1".into()),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(
                all[i + 1..].iter().all(|b| a.password != b.password),
                "{a:?}"
            );
        }
        assert_eq!(all[0], proxy(&secret, &"0".into(), Epoch(1)));
        assert!(!format!("{:?}", all[0]).contains(&all[0].password));
    }
}
