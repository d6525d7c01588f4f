//! How many replicas must have a write before it is acknowledged.
//!
//! **Invariant:** never more than a shard has by the instance's record, or no write could ever be
//! acknowledged. Proxies follow within milliseconds of the record.

use prost::Message as _;
use slotmesh_proto::instance::v1 as api;
use slotmesh_task::admit::RefusalKind;
use slotmesh_topology::Instance;
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, busy, change::revision_of};
use crate::grpc::{refuse, token::Token};

/// Whether so many replicas can confirm a write.
///
/// # Errors
/// When there are fewer.
#[allow(clippy::result_large_err)]
pub(super) fn check(durability: u32, replicas_per_shard: u32) -> Result<(), Status> {
    if durability <= replicas_per_shard {
        return Ok(());
    }
    Err(refuse(
        RefusalKind::Invalid,
        "DURABILITY_INVALID",
        format!(
            "durability {durability} needs as many replicas, and each shard has \
             {replicas_per_shard}; give 0 to {replicas_per_shard}"
        ),
    ))
}

impl Instances {
    pub(super) async fn change_durability(
        &self,
        request: api::SetDurabilityRequest,
    ) -> Result<u64, Status> {
        let body = api::SetDurabilityRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(
            &request.client_token,
            "SetDurability",
            &body.encode_to_vec(),
        )?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            check(request.durability, instance.replicas_per_shard)?;
            let next = Instance {
                durability: request.durability,
                ..instance.clone()
            };
            let replaced = self.replace(term, &instance, revision, &next, &token);
            if let Some(revision) = replaced.await? {
                info!(instance = %next.id, durability = next.durability, "durability changed");
                return Ok(revision);
            }
        }
        Err(busy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_replicas_are_asked_for_than_there_are() {
        assert!(check(0, 0).is_ok() && check(2, 2).is_ok());
        let refused = check(2, 1).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().contains("0 to 1"), "{refused:?}");
    }
}
