//! Artifacts: from records and messages and back.

use slotmesh_proto::{artifact::v1 as api, store::v1 as store};

use super::{SCHEMA, WireError, schema};
use crate::artifact::{Artifact, Level, Product, SHA256_LENGTH, Version};

const RECORD: &str = "ArtifactRecord";

fn field(field: &'static str) -> WireError {
    WireError::Field {
        record: RECORD,
        field,
    }
}

/// Reads a record.
///
/// # Errors
/// When it is of a newer schema or not valid.
pub fn from_record(record: store::ArtifactRecord) -> Result<Artifact, WireError> {
    schema(RECORD, record.schema)?;
    let artifact = Artifact {
        product: product_from(record.product()).ok_or_else(|| field("product"))?,
        version: Version::parse(&record.version).ok_or_else(|| field("version"))?,
        level: level_from(record.level()).unwrap_or(Level::Low),
        sha256: sha256(&record.sha256).ok_or_else(|| field("sha256"))?,
        release_note: record.release_note,
        source: record.source,
        created_unix_ms: record.created_unix_ms,
    };
    artifact.check().map_err(|_| field("source"))?;
    Ok(artifact)
}

/// Writes a record.
#[must_use]
pub fn to_record(artifact: &Artifact) -> store::ArtifactRecord {
    store::ArtifactRecord {
        schema: SCHEMA,
        product: product_to(artifact.product).into(),
        version: artifact.version.to_string(),
        level: level_to(artifact.level).into(),
        release_note: artifact.release_note.clone(),
        sha256: artifact.sha256.to_vec(),
        source: artifact.source.clone(),
        created_unix_ms: artifact.created_unix_ms,
    }
}

/// Reads what an agent is told of an artifact, or a user says of one.
///
/// # Errors
/// Which field is wrong, and what it should be.
pub fn from_message(message: api::Artifact) -> Result<Artifact, String> {
    let artifact = Artifact {
        product: product_from(message.product())
            .ok_or("product must be PRODUCT_REDIS, PRODUCT_VALKEY or PRODUCT_PROXY")?,
        version: Version::parse(&message.version)
            .ok_or_else(|| format!("version {:?} is not like 7.0.15", message.version))?,
        level: level_from(message.level()).unwrap_or(Level::Low),
        sha256: (hex::decode(&message.sha256).ok())
            .and_then(|bytes| sha256(&bytes))
            .ok_or("sha256 must be 64 hexadecimal digits")?,
        release_note: message.release_note,
        source: message.source,
        created_unix_ms: 0,
    };
    artifact.check().map_err(|e| e.to_string())?;
    Ok(artifact)
}

/// Writes it for users and agents; the time is the caller's to set.
#[must_use]
pub fn to_message(artifact: &Artifact) -> api::Artifact {
    api::Artifact {
        name: artifact.name(),
        product: product_to(artifact.product).into(),
        version: artifact.version.to_string(),
        level: level_to(artifact.level).into(),
        release_note: artifact.release_note.clone(),
        sha256: hex::encode(artifact.sha256),
        source: artifact.source.clone(),
        created_at: String::new(),
    }
}

fn sha256(bytes: &[u8]) -> Option<[u8; SHA256_LENGTH]> {
    bytes.try_into().ok()
}

fn product_from(product: store::Product) -> Option<Product> {
    Some(match product {
        store::Product::Redis => Product::Redis,
        store::Product::Valkey => Product::Valkey,
        store::Product::Proxy => Product::Proxy,
        store::Product::Unspecified => return None,
    })
}

fn product_to(product: Product) -> store::Product {
    match product {
        Product::Redis => store::Product::Redis,
        Product::Valkey => store::Product::Valkey,
        Product::Proxy => store::Product::Proxy,
    }
}

/// A level, if it is one.
#[must_use]
pub fn level_from(level: store::ReleaseLevel) -> Option<Level> {
    Some(match level {
        store::ReleaseLevel::Low => Level::Low,
        store::ReleaseLevel::Medium => Level::Medium,
        store::ReleaseLevel::High => Level::High,
        store::ReleaseLevel::Unspecified => return None,
    })
}

/// A level as records and messages say it.
#[must_use]
pub fn level_to(level: Level) -> store::ReleaseLevel {
    match level {
        Level::Low => store::ReleaseLevel::Low,
        Level::Medium => store::ReleaseLevel::Medium,
        Level::High => store::ReleaseLevel::High,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> api::Artifact {
        api::Artifact {
            product: store::Product::Valkey.into(),
            version: "8.0.1".into(),
            level: store::ReleaseLevel::High.into(),
            sha256: "0a".repeat(SHA256_LENGTH),
            source: "file:///opt/valkey-server".into(),
            ..api::Artifact::default()
        }
    }

    #[test]
    fn an_artifact_is_the_same_after_the_store_and_the_wire() {
        let artifact = from_message(message()).unwrap();
        assert_eq!(artifact.name(), "valkey-8.0.1");
        assert_eq!(from_record(to_record(&artifact)), Ok(artifact.clone()));
        assert_eq!(from_message(to_message(&artifact)), Ok(artifact));
    }

    #[test]
    fn what_is_wrong_with_a_message_is_said() {
        let wrong = |change: fn(&mut api::Artifact)| {
            let mut message = message();
            change(&mut message);
            from_message(message).unwrap_err()
        };
        assert!(wrong(|m| m.product = 0).contains("product"));
        assert!(wrong(|m| m.version = "8".into()).contains("like 7.0.15"));
        assert!(wrong(|m| m.sha256 = "0g".repeat(SHA256_LENGTH)).contains("64"));
        assert!(wrong(|m| m.sha256 = "€€".repeat(SHA256_LENGTH)).contains("64"));
        assert!(wrong(|m| m.source = "there".into()).contains("file:///"));
    }
}
