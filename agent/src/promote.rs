//! Whether a process may be made the primary of a failover's epoch.
//!
//! Invariant: a process is promoted only at an epoch at which it follows nobody, so that everything
//! that it was chosen for is still all that it has, and never against a promise that was given in
//! the place of the lost primary's lease.

use slotmesh_proto::{
    agent::v1::{ExecuteStepRequest, NodeReport, Promote},
    store::v1::{FenceProof, NodeRole},
};

/// Why not; `None`: it may be, once a controller has confirmed that the record says so. `promised`:
/// this host has promised the shard's primary not to, and the promise still holds.
pub fn refusal(
    request: &ExecuteStepRequest,
    order: &Promote,
    seen: &NodeReport,
    promised: bool,
) -> Option<&'static str> {
    if order.run_id.is_empty() || order.run_id != seen.run_id {
        return Some("another process runs as this node now");
    }
    // Only a lease that ran out says nothing of the primary itself. Whoever saw it end, or fenced it,
    // knows more than it did when it asked.
    if order.proof() == FenceProof::Lease && promised {
        return Some("this host has promised the primary not to promote; the promise still holds");
    }
    if order.proof() == FenceProof::Unspecified {
        return Some("nothing proves that the primary before is fenced");
    }
    match seen.observed_role() {
        // Promoted by this very step before its answer was lost, or by the engine in a switchover.
        NodeRole::Primary => None,
        NodeRole::Replica if seen.detached && seen.assigned_epoch == request.epoch => None,
        NodeRole::Replica => Some("the node is not detached at this epoch"),
        _ => Some("the node's role is not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Promote, &mut NodeReport), promised: bool) -> bool {
        let request = ExecuteStepRequest {
            epoch: 4,
            ..ExecuteStepRequest::default()
        };
        let mut order = Promote {
            node_id: "b".into(),
            run_id: "run".into(),
            proof: FenceProof::Lease.into(),
        };
        let mut seen = NodeReport {
            run_id: "run".into(),
            observed_role: NodeRole::Replica.into(),
            detached: true,
            assigned_epoch: 4,
            ..NodeReport::default()
        };
        change(&mut order, &mut seen);
        refusal(&request, &order, &seen, promised).is_some()
    }

    #[test]
    fn only_the_named_process_detached_at_this_epoch_or_promoted_already_may_be() {
        assert!(!refused(|_, _| {}, false));
        assert!(refused(|_, seen| seen.run_id = "other".into(), false));
        assert!(refused(|_, seen| seen.detached = false, false));
        assert!(refused(|_, seen| seen.assigned_epoch = 3, false));
        let promoted = |_: &mut Promote, seen: &mut NodeReport| {
            seen.detached = false;
            seen.observed_role = NodeRole::Primary.into();
        };
        assert!(!refused(promoted, false));
    }

    #[test]
    fn a_promise_stands_against_a_lease_that_ran_out_and_against_nothing_else() {
        assert!(refused(|_, _| {}, true));
        for proof in [FenceProof::Exited, FenceProof::Fenced, FenceProof::Operator] {
            assert!(!refused(|order, _| order.proof = proof.into(), true));
        }
        let unproved = |order: &mut Promote, _: &mut NodeReport| {
            order.proof = FenceProof::Unspecified.into();
        };
        assert!(refused(unproved, false));
    }
}
