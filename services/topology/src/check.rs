//! What must hold of an instance's shards taken together. Checked before a record is written and
//! after it is read.

use crate::{
    shard::{NodeRole, Shard},
    slot::SLOT_COUNT,
};

/// A broken invariant: a bug of ours or a damaged store.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Two shards own the slot.
    #[error("slot {0} belongs to two shards")]
    SlotTwice(u16),
    /// No shard owns the slot.
    #[error("slot {0} belongs to no shard")]
    SlotMissing(u16),
    /// Not exactly one member is primary, or it isn't the one that is named.
    #[error("shard {0}: the named primary and the members' roles differ")]
    Primary(String),
}

/// Every slot belongs to one shard, and every shard has one primary.
///
/// # Errors
/// The first thing found wrong.
pub fn shards(shards: &[Shard]) -> Result<(), CheckError> {
    let mut owned = vec![false; usize::from(SLOT_COUNT)];
    for shard in shards {
        self::shard(shard)?;
        for range in &shard.slots {
            for slot in range.first()..=range.last() {
                if std::mem::replace(&mut owned[usize::from(slot)], true) {
                    return Err(CheckError::SlotTwice(slot));
                }
            }
        }
    }
    match (0..SLOT_COUNT).find(|slot| !owned[usize::from(*slot)]) {
        Some(slot) => Err(CheckError::SlotMissing(slot)),
        None => Ok(()),
    }
}

/// The named primary is the one member with that role.
///
/// # Errors
/// When it is not.
pub fn shard(shard: &Shard) -> Result<(), CheckError> {
    let mut primaries = shard.members.iter().filter(|m| m.role == NodeRole::Primary);
    match (primaries.next(), primaries.next()) {
        (Some(one), None) if one.node == shard.primary => Ok(()),
        _ => Err(CheckError::Primary(shard.id.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::shard;

    #[test]
    fn finds_gaps_overlaps_and_two_primaries() {
        assert_eq!(shards(&[shard()]), Ok(()));
        assert_eq!(shards(&[shard(), shard()]), Err(CheckError::SlotTwice(0)));
        assert_eq!(shards(&[]), Err(CheckError::SlotMissing(0)));
        let mut two = shard();
        two.members[1].role = NodeRole::Primary;
        assert_eq!(shards(&[two]), Err(CheckError::Primary("0".into())));
    }
}
