//! The shard streams: their names, subjects and settings, creating them, and judging those that exist.

use std::collections::HashMap;

use async_nats::jetstream::{
    ErrorCode,
    context::{Context, GetStreamErrorKind},
    stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType},
};
use birb_nest_core::{Base, Key, Shard};

use super::life::{Gate, Life};
use crate::{
    config::LogConfig,
    refusal::{OpenError, chain},
};

const METADATA_SHARDS: &str = "birb-nest.shards";

/// The name of `shard`'s stream.
pub(super) fn name(config: &LogConfig, shard: Shard) -> String {
    format!("{}_{shard}", config.nats_stream_name)
}

/// What all subjects of one life of `shard` begin with; the last dot is in it.
pub(super) fn subject_prefix(config: &LogConfig, shard: Shard, base: Base) -> String {
    format!("{}.w.{shard}.{base}.", config.nats_subject_prefix)
}

/// The base of the life in which a message on `subject` was written, and the key that it is about.
pub(super) fn parse_subject(subject: &str) -> Option<(Base, Key)> {
    let (rest, key) = subject.rsplit_once('.')?;
    let (_, base) = rest.rsplit_once('.')?;
    Some((base.parse().ok()?, Key::from_token(key).ok()?))
}

/// What a stream listens to in a life. Nobody publishes to the subject of one that is not open: every writer gets *no
/// responders* then.
fn subject(config: &LogConfig, shard: Shard, base: Base, gate: Gate) -> String {
    let closed = |why: &str| format!("{}.{why}.{shard}.{base}", config.nats_subject_prefix);
    match gate {
        Gate::Open => format!("{}*", subject_prefix(config, shard, base)),
        Gate::Fenced => closed("fenced"),
        Gate::Resharding => closed("resharding"),
    }
}

fn settings(config: &LogConfig, shard: Shard, base: Base, gate: Gate) -> Config {
    Config {
        name: name(config, shard),
        description: Some(format!("birb-nest: shard {shard} of the log")),
        subjects: vec![subject(config, shard, base, gate)],
        retention: RetentionPolicy::Limits,
        // Only a key's newest write is kept: a hot key coalesces in the log.
        max_messages_per_subject: 1,
        // A full log refuses; DiscardOld would drop acknowledged writes. One limit only (nats-server#4771).
        discard: DiscardPolicy::New,
        max_bytes: i64::try_from(config.nats_stream_max_bytes).unwrap_or(i64::MAX),
        max_messages: -1,
        storage: StorageType::File,
        num_replicas: config.nats_replicas,
        allow_direct: true,
        metadata: metadata(config),
        ..Config::default()
    }
}

fn metadata(config: &LogConfig) -> HashMap<String, String> {
    HashMap::from([(METADATA_SHARDS.to_owned(), config.nats_shards.to_string())])
}

/// The stream of `shard` and the life it is in; `None` when there is no such stream.
///
/// # Errors
/// Refused when the stream is not one that this configuration would have made.
pub(super) async fn find(
    context: &Context,
    config: &LogConfig,
    shard: Shard,
    server: &str,
) -> Result<Option<Life>, OpenError> {
    let name = name(config, shard);
    match context.get_stream(&name).await {
        Ok(stream) => {
            let (base, gate) = judge(stream.cached_info(), config, shard)
                .map_err(|why| OpenError::refused(server, format!("stream {name} {why}")))?;
            Ok(Some(Life {
                base,
                gate,
                subject_prefix: subject_prefix(config, shard, base),
                stream,
            }))
        }
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(None)
            }
            GetStreamErrorKind::JetStream(error)
                if matches!(
                    error.error_code(),
                    ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
                ) =>
            {
                Err(OpenError::refused(server, "JetStream is not enabled there"))
            }
            _ => Err(OpenError::unreachable(
                server,
                format!("failed to read stream {name}: {}", chain(&error)),
            )),
        },
    }
}

/// Makes the stream of `shard`'s life that begins at `base`.
pub(super) async fn create(
    context: &Context,
    config: &LogConfig,
    shard: Shard,
    base: Base,
    gate: Gate,
    server: &str,
) -> Result<(), OpenError> {
    let settings = settings(config, shard, base, gate);
    let name = settings.name.clone();
    match context.create_stream(settings).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let why = format!("failed to create stream {name}: {}", chain(&error));
            // 10047: the server has no room for what max_bytes would reserve.
            if why.contains("insufficient storage") {
                return Err(OpenError::refused(
                    server,
                    format!(
                        "{why}; {} shards of NATS_STREAM_MAX_BYTES={} bytes do not fit its file store",
                        config.nats_shards, config.nats_stream_max_bytes
                    ),
                ));
            }
            Err(OpenError::unreachable(server, why))
        }
    }
}

/// The subject of a key's dead letter.
pub(super) fn dead_letter_subject(config: &LogConfig, shard: Shard, key: &Key) -> String {
    format!(
        "{}.dlq.{shard}.{}",
        config.nats_subject_prefix,
        key.to_token()
    )
}

/// Makes the dead-letter stream, or gives it the size and replicas that are configured now.
pub(super) async fn prepare_dead_letters(
    context: &Context,
    config: &LogConfig,
    server: &str,
) -> Result<(), OpenError> {
    let settings = Config {
        name: config.nats_dlq_stream_name.clone(),
        description: Some("birb-nest: writes that PostgreSQL refused for good".to_owned()),
        subjects: vec![format!("{}.dlq.>", config.nats_subject_prefix)],
        retention: RetentionPolicy::Limits,
        // The newest dead letter of a key is the one its row in dead_keys points to.
        max_messages_per_subject: 1,
        discard: DiscardPolicy::New,
        max_bytes: i64::try_from(config.nats_dlq_max_bytes).unwrap_or(i64::MAX),
        max_messages: -1,
        storage: StorageType::File,
        num_replicas: config.nats_replicas,
        allow_direct: true,
        ..Config::default()
    };
    make(context, settings, server).await
}

/// Makes a stream, or gives it the settings that are configured now.
pub(super) async fn make(
    context: &Context,
    settings: Config,
    server: &str,
) -> Result<(), OpenError> {
    let name = settings.name.clone();
    match context.create_or_update_stream(settings).await {
        Ok(_) => Ok(()),
        Err(error) => Err(OpenError::unreachable(
            server,
            format!("failed to make stream {name}: {}", chain(&error)),
        )),
    }
}

/// Gives an existing stream the size and replicas that are configured now.
pub(super) async fn update(
    context: &Context,
    config: &LogConfig,
    shard: Shard,
    life: &Life,
    server: &str,
) -> Result<(), OpenError> {
    let settings = settings(config, shard, life.base, life.gate);
    let found = &life.stream.cached_info().config;
    if found.max_bytes == settings.max_bytes && found.num_replicas == settings.num_replicas {
        return Ok(());
    }
    let name = settings.name.clone();
    tracing::info!(
        max_bytes = settings.max_bytes,
        replicas = settings.num_replicas,
        "changing stream {name}"
    );
    match context.update_stream(settings).await {
        Ok(_) => Ok(()),
        Err(error) => Err(OpenError::refused(
            server,
            format!(
                "stream {name} cannot be given NATS_STREAM_MAX_BYTES or NATS_REPLICAS: {}",
                chain(&error)
            ),
        )),
    }
}

/// Whether an existing stream can be trusted as `shard`'s, its base, and whether it takes writes.
fn judge(info: &Info, config: &LogConfig, shard: Shard) -> Result<(Base, Gate), String> {
    let found = &info.config;
    let Some(count) = found.metadata.get(METADATA_SHARDS) else {
        return Err("was not made by birb-nest; choose another NATS_STREAM_NAME".to_owned());
    };
    if found.retention != RetentionPolicy::Limits
        || found.discard != DiscardPolicy::New
        || found.max_messages_per_subject != 1
        || found.storage != StorageType::File
        || found.max_age != std::time::Duration::ZERO
        || found.max_messages > 0
        || !found.allow_direct
    {
        return Err(
            "was changed: retention limits, discard new, one message per subject, no other limit than bytes, file storage \
             and direct get are needed"
                .to_owned(),
        );
    }
    let [subject] = found.subjects.as_slice() else {
        return Err("has not exactly one subject".to_owned());
    };
    let base = subject.trim_end_matches(".*").rsplit('.').next();
    let base = base.and_then(|text| text.parse::<Base>().ok());
    let gate = base.and_then(|base| {
        [Gate::Open, Gate::Fenced, Gate::Resharding]
            .into_iter()
            .find(|gate| *subject == self::subject(config, shard, base, *gate))
    });
    let (Some(base), Some(gate)) = (base, gate) else {
        let prefix = &config.nats_subject_prefix;
        return Err(format!(
            "has subject {subject}, `{prefix}.w.{shard}.<base>.*` is expected"
        ));
    };
    // Of one that is closed it says nothing: whoever opens it sets it.
    if gate == Gate::Open && *count != config.nats_shards.to_string() {
        return Err(format!(
            "is one of {count} shards, but NATS_SHARDS is {}; `birb-nest setup --reshard` changes the number of a nest",
            config.nats_shards
        ));
    }
    Ok((base, gate))
}

/// Lets writers into the life of `shard` under `base`, or keeps them out. Nothing else of the stream changes, only the
/// number of shards that it says when it is opened.
pub(super) async fn set_gate(
    context: &Context,
    config: &LogConfig,
    shard: Shard,
    base: Base,
    gate: Gate,
) -> Result<(), String> {
    let name = name(config, shard);
    let failed = |why: String| format!("failed to change the subjects of stream {name}: {why}");
    let found = context.get_stream(&name).await;
    // Size and replicas stay as they are: `setup` may have changed them since this process was started.
    let mut settings = found
        .map_err(|error| failed(chain(&error)))?
        .cached_info()
        .config
        .clone();
    settings.subjects = vec![subject(config, shard, base, gate)];
    if gate == Gate::Open {
        settings.metadata.extend(metadata(config));
    }
    match context.update_stream(settings).await {
        Ok(_) => Ok(()),
        Err(error) => Err(failed(chain(&error))),
    }
}
