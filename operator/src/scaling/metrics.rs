//! What each nest's scaling shows in `/metrics`: as long as it is followed, so that none stays behind.

use std::sync::Arc;

use opentelemetry::{KeyValue, global, metrics::AsyncInstrument};

use super::{Scaler, Scaling};

/// Lets the meter look at `scaling`.
pub fn observe(scaling: &Arc<Scaling>) {
    gauge(
        scaling,
        "birbnest_operator_lag_messages",
        "Messages in the log that are not stored yet, while that is known",
        |scaler, observer, labels| {
            if let Some(Ok(reading)) = &scaler.last {
                observer.observe(reading.backlog, labels);
            }
        },
    );
    gauge(
        scaling,
        "birbnest_operator_workers_desired",
        "Workers there should be by the lag",
        |scaler, observer, labels| {
            observer.observe(unsigned(scaler.wanted()), labels);
        },
    );
    gauge(
        scaling,
        "birbnest_operator_workers_ready",
        "Workers that are ready, as the last pass saw it",
        |scaler, observer, labels| {
            observer.observe(unsigned(scaler.followed.ready), labels);
        },
    );
    gauge(
        scaling,
        "birbnest_operator_scaling_held",
        "1, with the reason why there are not as many workers as the lag alone asks for",
        |scaler, observer, labels| {
            let reason = KeyValue::new("reason", scaler.hold.as_str());
            observer.observe(1, &[labels, &[reason]].concat());
        },
    );
}

type Look = fn(&Scaler, &dyn AsyncInstrument<u64>, &[KeyValue]);

fn gauge(scaling: &Arc<Scaling>, name: &'static str, description: &'static str, look: Look) {
    let scaling = Arc::clone(scaling);
    global::meter("birb-nest-operator")
        .u64_observable_gauge(name)
        .with_description(description)
        .with_callback(move |observer| {
            for scaler in scaling.lock().values() {
                let nest = &scaler.followed.nest;
                let labels = [
                    KeyValue::new("namespace", nest.namespace.clone().unwrap_or_default()),
                    KeyValue::new("nest", nest.name.clone()),
                ];
                look(scaler, observer, &labels);
            }
        })
        .build();
}

fn unsigned(number: i32) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
