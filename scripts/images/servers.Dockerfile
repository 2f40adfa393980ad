# Stand-ins for the public images that the operator runs by default, where no image registry can be reached: their
# names, users, entry points and variables, made of Debian's packages and of nats-server's Go module by
# scripts/server-images.sh, which brings the contexts: `debian` (PostgreSQL, Redis and what they need), `nats`, `entry`.

FROM scratch AS servers
COPY --from=debian / /

FROM servers AS postgres
COPY --from=entry /postgres.sh /usr/local/bin/docker-entrypoint.sh
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin \
    LANG=C.UTF-8 \
    PG_MAJOR=15 \
    PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["docker-entrypoint.sh"]
# A fast shutdown: SIGTERM would wait for every client to leave.
STOPSIGNAL SIGINT
EXPOSE 5432
CMD ["postgres"]

FROM servers AS redis
COPY --from=entry /redis.sh /usr/local/bin/docker-entrypoint.sh
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
VOLUME /data
WORKDIR /data
ENTRYPOINT ["docker-entrypoint.sh"]
EXPOSE 6379
CMD ["redis-server"]

FROM scratch AS nats
COPY --from=nats / /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/
EXPOSE 4222 6222 8222
ENTRYPOINT ["/nats-server"]
CMD ["--config", "nats-server.conf"]
